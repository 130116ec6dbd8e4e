# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token of every row of a batch, each by its own settings and its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Chooser", "Sampling", "choose"]


@dataclass(frozen=True)
class Sampling:
    """How a text is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: of the most likely tokens, as many as make up this probability.
        top_k: at most so many tokens; 0 for all.
        repetition_penalty: above 1 makes tokens that were there less likely.
        seed: of the random numbers; the same for the same text, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError(
                f"{self}: expected temperature >= 0, 0 < top_p <= 1, top_k >= 0 and repetition_penalty > 0"
            )


class Chooser:
    """A row's settings and where its random numbers are."""

    def __init__(self, sampling: Sampling) -> None:
        """Begins at the seed."""
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))


def choose(logits: torch.Tensor, choosers: Sequence[Chooser], texts: Sequence[Sequence[int]]) -> list[int]:
    """The next token of every row.

    Args:
        logits: [rows, vocabulary]; minus infinity for what may not come.
        choosers: of the rows.
        texts: prompt and continuation of each row, for the repetition penalty.
    """
    penalized = [row for row, chooser in enumerate(choosers) if chooser.sampling.repetition_penalty != 1]
    sampled = [row for row, chooser in enumerate(choosers) if chooser.sampling.temperature > 0]
    if penalized:
        logits = logits.clone()
    for row in penalized:
        _penalize(logits[row], texts[row], choosers[row].sampling.repetition_penalty)
    tokens = logits.argmax(dim=-1)
    if sampled:
        tokens[sampled] = _sample(logits[sampled].float(), [choosers[row] for row in sampled])
    chosen: list[int] = tokens.tolist()
    return chosen


def _penalize(logits: torch.Tensor, text: Sequence[int], penalty: float) -> None:
    seen = torch.tensor(sorted(set(text)), device=logits.device)
    found = logits[seen]
    logits[seen] = torch.where(found < 0, found * penalty, found / penalty)


def _sample(logits: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """Temperature, then top_k, then top_p; the token at which the summed probabilities pass the random number."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    settings = [chooser.sampling for chooser in choosers]
    scaled = logits / column([each.temperature for each in settings])
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(ordered.shape[1], device=logits.device)
    most = column([each.top_k or ordered.shape[1] for each in settings])
    likely = ordered.masked_fill(places >= most, -torch.inf).softmax(dim=-1)
    before = likely.cumsum(dim=-1) - likely
    kept = likely.masked_fill(before >= column([each.top_p for each in settings]), 0).cumsum(dim=-1)
    wanted = column([chooser.draw() for chooser in choosers]) * kept[:, -1:]
    place = (kept <= wanted).sum(dim=-1, keepdim=True).clamp_max(ordered.shape[1] - 1)
    return order.gather(1, place)[:, 0]
