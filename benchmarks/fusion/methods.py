# SPDX-License-Identifier: Apache-2.0
"""The methods compared: each gives a model that answers, from the experts and 200 joint examples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.lora import read_peft_lora
from deltaweave.formats import Delta
from deltaweave.formats.fusion import Lora
from finetune import encode, replies
from skills import train_xlora
from tasks import Item, joint, verdict

from deltaweave.gates.baselines import HubRecipe, average_weights, search_weights
from deltaweave.gates.examples import Example, ExampleSet
from deltaweave.gates.experts import delta_as_lora
from deltaweave.gates.mixture import FixedWeights, attach_mixture
from deltaweave.gates.training import GateRecipe, train_gates
from deltaweave.models import load_checkpoint

__all__ = ["METHODS", "Bench", "score"]

BATCH = 768
SAMPLES = 4
Answering = Any  # a context in which a model answers, with what is worth noting of how it was made


@dataclass
class Bench:
    """What every cell needs.

    Attributes:
        folder: of the experts: `maths-lora/`, `maths.safetensors`, the same for `german`.
        base: Hugging Face folder.
        model: the base in memory, nothing attached.
        tokenizer: its tokenizer.
        examples: joint examples a gate is trained on.
        epochs: over them.
    """

    folder: Path
    base: Path
    model: Any
    tokenizer: Any
    examples: int = 200
    epochs: int = 5

    def loras(self) -> list[Lora]:
        """The skills' LoRAs; the task's, mathematics, is the last."""
        return [read_peft_lora(self.folder / f"{skill}-lora", name=skill) for skill in ("german", "maths")]

    def deltas(self) -> list[Lora]:
        """The skills' compressed full fine-tunes."""
        found = []
        for skill in ("german", "maths"):
            with Delta.open(self.folder / f"{skill}.safetensors") as delta:
                found.append(delta_as_lora(delta, skill))
        return found

    def joint_examples(self, seed: int) -> list[Example]:
        """Examples of templates that no test has."""
        source = random.Random(f"joint {seed}")
        return [encode(joint(source, held_out=False), self.tokenizer) for _ in range(self.examples)]


@contextmanager
def _fixed(bench: Bench, seed: int, experts: Callable[[Bench], list[Lora]], weights: Sequence[float]) -> Iterator[Any]:
    with attach_mixture(bench.model, experts(bench), FixedWeights(weights)):
        yield bench.model, {"weights": list(weights)}


@contextmanager
def _base(bench: Bench, seed: int) -> Iterator[Any]:
    with nullcontext():
        yield bench.model, {}


@contextmanager
def _hub(bench: Bench, seed: int, experts: Callable[[Bench], list[Lora]]) -> Iterator[Any]:
    loras = experts(bench)
    found = search_weights(bench.model, loras, _set(bench, seed), HubRecipe(seed=seed, batch_size=100))
    with attach_mixture(bench.model, loras, FixedWeights(found.weights)):
        yield bench.model, {"weights": list(found.weights), "evaluations": len(found.history)}


@contextmanager
def _flow(bench: Bench, seed: int, experts: Callable[[Bench], list[Lora]]) -> Iterator[Any]:
    loras = experts(bench)
    trained = train_gates(bench.model, loras, _set(bench, seed), GateRecipe(seed=seed, epochs=bench.epochs))
    with attach_mixture(bench.model, loras, trained.weights):
        yield bench.model, {"training_seconds": round(trained.seconds, 1), **trained.describe()}


@contextmanager
def _xlora(bench: Bench, seed: int) -> Iterator[Any]:
    from peft import XLoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = load_checkpoint(bench.base, bench.model.dtype).to(bench.model.device)
    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(index): str(bench.folder / f"{skill}-lora") for index, skill in enumerate(("german", "maths"))},
        layerwise_scalings=True,
    )
    mixed = get_peft_model(model, config).to(bench.model.device)
    mixed.train()
    train_xlora(mixed, bench.joint_examples(seed), bench.epochs, 16, 1e-3, seed)
    yield mixed.eval(), {"peft": True, "epochs": bench.epochs, "batch_size": 16, "learning_rate": 1e-3}


# Experts are in the order (german, maths). Every method is a context manager of (bench, seed) giving (model, notes).
METHODS: dict[str, Callable[[Bench, int], Answering]] = {
    "base": _base,
    "LoRA german": partial(_fixed, experts=Bench.loras, weights=(1.0, 0.0)),
    "LoRA maths": partial(_fixed, experts=Bench.loras, weights=(0.0, 1.0)),
    "average": partial(_fixed, experts=Bench.loras, weights=average_weights(2)),
    "sum": partial(_fixed, experts=Bench.loras, weights=(1.0, 1.0)),
    "LoRA-Hub": partial(_hub, experts=Bench.loras),
    "LoRA-Flow": partial(_flow, experts=Bench.loras),
    "X-LoRA (PEFT)": _xlora,
    "delta german": partial(_fixed, experts=Bench.deltas, weights=(1.0, 0.0)),
    "delta maths": partial(_fixed, experts=Bench.deltas, weights=(0.0, 1.0)),
    "average of deltas": partial(_fixed, experts=Bench.deltas, weights=average_weights(2)),
    "LoRA-Hub over deltas": partial(_hub, experts=Bench.deltas),
    "LoRA-Flow over deltas": partial(_flow, experts=Bench.deltas),
}


def score(model: Any, tokenizer: Any, items: Sequence[Item], new_tokens: int) -> dict[str, Any]:
    """Shares of items whose greedy answer is right, in whole and in its parts, and the first few answers."""
    answers: list[str] = []
    for start in range(0, len(items), BATCH):
        chunk = items[start : start + BATCH]
        answers += replies(model, tokenizer, [item.prompt for item in chunk], new_tokens)
    verdicts = [verdict(item, reply) for item, reply in zip(items, answers, strict=True)]
    shares = {part: sum(found[part] for found in verdicts) / len(verdicts) for part in verdicts[0]}
    samples = [
        {"prompt": item.prompt, "expected": item.completion, "reply": reply}
        for item, reply in zip(items[:SAMPLES], answers, strict=False)
    ]
    return {**shares, "samples": samples}


def _set(bench: Bench, seed: int) -> ExampleSet:
    return ExampleSet("generated", "", tuple(bench.joint_examples(seed)))
