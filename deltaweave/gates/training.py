# SPDX-License-Identifier: Apache-2.0
"""LoRA-Flow's training: gates and biases alone, by the published recipe; an interrupted run goes on where it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from deltaweave.converter import Progress
from deltaweave.formats.fusion import Lora
from deltaweave.gates.examples import IGNORED, Batch, Example, ExampleSet, collate
from deltaweave.gates.experts import GateError
from deltaweave.gates.mixture import TokenWeights, attach_mixture
from deltaweave.gates.state import load_state, save_state

__all__ = ["GateRecipe", "GateTraining", "answer_loss", "evaluate_loss", "train_gates"]

SECONDS_BETWEEN_SAVES = 30.0
# From this batch size on, the paper's smaller learning rate holds.
LARGE_BATCH = 16


@dataclass(frozen=True)
class GateRecipe:
    """How gates are trained; the defaults are the published ones.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples a step.
        learning_rate: the highest; None takes 1e-3, or 1e-4 for batches of 16 and more.
        warmup: share of the steps in which the rate rises; it falls along a cosine after them.
        beta1, beta2, epsilon, weight_decay: AdamW's.
        clip: largest norm of a step's gradient.
        temperature: of the gates' softmax.
        seed: of the order of the examples.
    """

    epochs: int = 5
    batch_size: int = 4
    learning_rate: float | None = None
    warmup: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "batch_size": self.batch_size, "clip": self.clip}
        positive |= {"learning_rate": self.peak_rate, "temperature": self.temperature, "epsilon": self.epsilon}
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise GateError(f"{name} {value}, expected a finite number above 0")
        if not 0 <= self.warmup <= 1:
            raise GateError(f"warmup {self.warmup}, expected a share between 0 and 1")

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.batch_size >= LARGE_BATCH else 1e-3

    def steps(self, examples: int) -> int:
        """Optimiser steps over so many examples."""
        return self.epochs * math.ceil(examples / self.batch_size)


@dataclass
class GateTraining:
    """What a training came to.

    Attributes:
        weights: the gates chosen.
        losses: every step's mean loss over the answers' tokens.
        rates: every step's learning rate.
        dev_losses: over the dev examples, before training and after every epoch; empty without any.
        best_epoch: whose gates were chosen: the lowest dev loss, else the last.
        resumed_at: the step that this run began with.
        seconds: this run took.
    """

    weights: TokenWeights
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    dev_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    resumed_at: int = 0
    seconds: float = 0.0

    def describe(self) -> dict[str, Any]:
        """What a fusion says of it."""
        return {
            "steps": len(self.losses),
            "first_loss": round(self.losses[0], 6),
            "last_loss": round(self.losses[-1], 6),
            "dev_losses": [round(loss, 6) for loss in self.dev_losses],
            "best_epoch": self.best_epoch,
        }


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the answers' tokens of a batch, in float32 or wider."""
    output: Any = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    kept = batch.targets != IGNORED
    logits: torch.Tensor = output.logits[kept]
    return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), batch.targets[kept])


@torch.no_grad()
def evaluate_loss(model: nn.Module, examples: Sequence[Example], pad: int, batch_size: int = 32) -> float:
    """Mean cross entropy over all answers' tokens."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        tokens = sum(len(example.answer) for example in chunk)
        total += answer_loss(model, collate(chunk, pad).to(device)).item() * tokens
        count += tokens
    return total / count


def train_gates(
    model: nn.Module,
    loras: Sequence[Lora],
    examples: ExampleSet,
    recipe: GateRecipe,
    *,
    task: int = -1,
    dev: ExampleSet | None = None,
    pad: int = 0,
    checkpointing: bool = False,
    state: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> GateTraining:
    """Trains gates over experts of a base model, which is left as it was.

    Args:
        model: a Hugging Face causal language model in evaluation mode, on its device.
        loras: at least two.
        examples: what is trained on.
        recipe: how.
        task: index of the expert that is on at the start, the others being off.
        dev: what the best epoch is chosen by; the start counts as epoch 0.
        pad: token that fills rows up.
        checkpointing: keep only the inputs of blocks for the backward pass.
        state: where unfinished work is kept; removed in the end. None keeps none.
        key: JSON values that decide the result beside `recipe`; unfinished work with others is refused.
        progress: told how far the work is.

    Raises:
        GateError: fewer than two experts, a `task` beyond them, or a loss that is not finite.
        ResumeError: unfinished work of another training.
    """
    if len(loras) < 2:
        raise GateError(f"{len(loras)} expert, a gate needs at least two")
    if not -len(loras) <= task < len(loras):
        raise GateError(f"task expert {task} of {len(loras)}")
    config: Any = model.config
    weights = TokenWeights.starting(
        config.num_hidden_layers, len(loras), config.hidden_size, task % len(loras), recipe.temperature
    )
    if next(model.parameters()).dtype == torch.float64:
        weights.double()
    with attach_mixture(model, loras, weights), _checkpointing(model, checkpointing):
        run = _Run(model, weights, examples.examples, dev, recipe, pad)
        return run.carry_out(state, {"recipe": asdict(recipe), **(key or {})}, progress or (lambda *_: None))


class _Run:
    """One training, step by step."""

    def __init__(
        self,
        model: nn.Module,
        weights: TokenWeights,
        examples: Sequence[Example],
        dev: ExampleSet | None,
        recipe: GateRecipe,
        pad: int,
    ) -> None:
        self.model, self.examples, self.dev, self.recipe, self.pad = model, examples, dev, recipe, pad
        self.device = next(model.parameters()).device
        self.result, self.best = GateTraining(weights), copy.deepcopy(weights.state_dict())
        self.steps, self.epoch_steps = recipe.steps(len(examples)), recipe.steps(len(examples)) // recipe.epochs
        self.optimizer = torch.optim.AdamW(
            weights.parameters(),
            lr=recipe.peak_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, round(recipe.warmup * self.steps), self.steps)

    def carry_out(self, state: Path | None, key: Mapping[str, Any], progress: Progress) -> GateTraining:
        started = saved = monotonic()
        result = self.result
        if state is not None and (found := load_state(state, key)) is not None:
            self._restore(found)
        result.resumed_at = len(result.losses)
        if self.dev is not None and not result.dev_losses:
            self._choose(0)
        for step in range(result.resumed_at, self.steps):
            self._step(step)
            if (step + 1) % self.epoch_steps == 0:
                self._choose((step + 1) // self.epoch_steps)
            progress("training the gates", step + 1, self.steps)
            if state is not None and monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                save_state(state, key, self._state())
                saved = monotonic()
        result.weights.load_state_dict(self.best)
        result.seconds = monotonic() - started
        return result

    def _step(self, step: int) -> None:
        batch = collate(self._batch(step), self.pad).to(self.device)
        loss = answer_loss(self.model, batch)
        if not torch.isfinite(loss):
            raise GateError(f"step {step + 1}: the loss is {loss.item()}; lower the learning rate or use float32")
        self.result.rates.append(self.schedule.get_last_lr()[0])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.result.weights.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        self.result.losses.append(loss.item())

    def _batch(self, step: int) -> list[Example]:
        """Examples of a step; an epoch's order depends on the seed and the epoch alone, so a resumed run has it too."""
        epoch, place = divmod(step, self.epoch_steps)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        start = place * self.recipe.batch_size
        return [self.examples[index] for index in order[start : start + self.recipe.batch_size]]

    def _choose(self, epoch: int) -> None:
        """Keeps the gates of the epoch that has ended, if they are the best so far."""
        result = self.result
        if self.dev is not None:
            result.dev_losses.append(evaluate_loss(self.model, self.dev.examples, self.pad))
            if result.dev_losses[-1] > min(result.dev_losses):
                return
        result.best_epoch, self.best = epoch, copy.deepcopy(result.weights.state_dict())

    def _state(self) -> dict[str, Any]:
        result = self.result
        return {
            "weights": result.weights.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": result.losses,
            "rates": result.rates,
            "dev_losses": result.dev_losses,
            "best_epoch": result.best_epoch,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        result = self.result
        result.weights.load_state_dict(state["weights"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        result.losses, result.rates = list(state["losses"]), list(state["rates"])
        result.dev_losses, result.best_epoch = list(state["dev_losses"]), state["best_epoch"]


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of the blocks; only they count as training, so that nothing drops out."""
    if not wanted:
        yield
        return
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of Transformers
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = list(model.get_submodule("model.layers"))
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
