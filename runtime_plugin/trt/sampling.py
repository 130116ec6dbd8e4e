# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token of rows that are not greedy, in numpy; the rules are the PyTorch host's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from deltaweave.runtime_plugin.requests import Chooser
from numpy.typing import NDArray

__all__ = ["choose"]


def choose(logits: NDArray[np.float32], chooser: Chooser, text: Sequence[int]) -> int:
    """The next token of one row.

    Args:
        logits: [vocabulary]; minus infinity for what may not come.
        chooser: of the row.
        text: prompt and continuation, for the repetition penalty.
    """
    settings = chooser.sampling
    if settings.repetition_penalty != 1:
        logits = _penalized(logits, text, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    order = _most_likely(logits, settings.top_k)
    scaled = logits[order] / np.float32(settings.temperature)
    likely = np.exp(scaled - scaled[0])
    likely /= likely.sum()
    before = likely.cumsum() - likely
    kept = np.where(before >= settings.top_p, 0, likely).cumsum()
    place = int((kept <= chooser.draw() * kept[-1]).sum())
    return int(order[min(place, len(order) - 1)])


def _penalized(logits: NDArray[np.float32], text: Sequence[int], penalty: float) -> NDArray[np.float32]:
    logits, seen = logits.copy(), np.unique(np.asarray(text, np.int64))
    found = logits[seen]
    logits[seen] = np.where(found < 0, found * penalty, found / penalty)
    return logits


def _most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Tokens by falling logit, at most `count` of them if it is not 0."""
    if 0 < count < len(logits):
        best = np.argpartition(-logits, count - 1)[:count]
        best.sort()
        return best[np.argsort(-logits[best], kind="stable")]
    return np.argsort(-logits, kind="stable")
