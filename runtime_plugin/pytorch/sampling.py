# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token of every row of a batch, each by its own settings and its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deltaweave.runtime_plugin.requests import Chooser

__all__ = ["choose"]


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
