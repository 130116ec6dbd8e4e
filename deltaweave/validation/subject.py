# SPDX-License-Identifier: Apache-2.0
"""What can be validated: anything that gives logits for tokens and continues them greedily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaweave.evaluation import complete_tokens
from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.requests import Request

if TYPE_CHECKING:  # it needs TensorRT's packages
    from deltaweave.runtime_plugin.trt.engine import Engine

__all__ = ["EngineSubject", "ModelSubject", "Outputs", "Subject"]


@dataclass(frozen=True)
class Outputs:
    """What a model makes of one text.

    Attributes:
        logits: behind every token, [tokens, vocabulary]; may be wider than the fine-tune's vocabulary.
        layers: the output of every decoder block, [tokens, hidden_size]; empty if they cannot be seen.
    """

    logits: torch.Tensor
    layers: tuple[torch.Tensor, ...]


class Subject(Protocol):
    """A model in some runtime."""

    def outputs(self, tokens: Sequence[int]) -> Outputs:
        """Runs one text."""
        ...

    def greedy(self, prompts: Sequence[Sequence[int]], most: int, stop: Collection[int]) -> list[list[int]]:
        """Continues each prompt by at most `most` tokens, up to a stop token, which is left out."""
        ...


class ModelSubject:
    """A Hugging Face model, as it is or with a fine-tune attached."""

    def __init__(
        self, model: PreTrainedModel, step: Callable[[int], AbstractContextManager[None]] = lambda rows: nullcontext()
    ) -> None:
        """Puts a model to the test.

        Args:
            model: in evaluation mode, on its device.
            step: what surrounds a call with so many rows: an arena says there whose they are.
        """
        self._model, self._step = model, step

    @torch.no_grad()
    def outputs(self, tokens: Sequence[int]) -> Outputs:
        """Runs one text through the model, its decoder blocks watched."""
        row = torch.tensor([list(tokens)], device=self._model.device)
        with self._step(1), _watched(self._model) as layers:
            logits: torch.Tensor = self._model(row, use_cache=False).logits[0]
        return Outputs(logits, tuple(layers))

    def greedy(self, prompts: Sequence[Sequence[int]], most: int, stop: Collection[int]) -> list[list[int]]:
        """Continues one prompt at a time: padding would change a 16-bit model's last bits."""
        found = []
        for prompt in prompts:
            with self._step(1):
                found += complete_tokens(self._model, [prompt], most, stop)
        return found


class EngineSubject:
    """A fine-tune in a TensorRT engine."""

    def __init__(self, engine: Engine, tenant: str | None) -> None:
        """`tenant`: a name that was added to the engine, or None for the base."""
        self._engine, self._tenant = engine, tenant

    def outputs(self, tokens: Sequence[int]) -> Outputs:
        """Runs one text, token by token; an engine does not show its layers."""
        return Outputs(torch.from_numpy(self._engine.logits(list(tokens), self._tenant)), ())

    def greedy(self, prompts: Sequence[Sequence[int]], most: int, stop: Collection[int]) -> list[list[int]]:
        """Continues all prompts, batched as the engine does it."""
        requests = [Request(list(prompt), self._tenant, most, frozenset(stop)) for prompt in prompts]
        return [list(completion.tokens) for completion in self._engine.run(requests)]


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects what each decoder block gives, [tokens, hidden_size], while the block lasts."""
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise DeltaweaveError(f"{type(model).__name__}: has no decoder blocks at model.layers")
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        yield seen
