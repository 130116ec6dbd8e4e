# SPDX-License-Identifier: Apache-2.0
"""What is asked of a host and what comes back: requests, how their tokens are chosen, completions. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["ActiveRow", "Chooser", "Completion", "Request", "Sampling"]


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

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is what is wanted, as the model has it."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


class Chooser:
    """A row's settings and where its random numbers are."""

    def __init__(self, sampling: Sampling) -> None:
        """Begins at the seed."""
        self.sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return float(self._generator.random())


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
        tokens: the prompt, at least one.
        tenant: a fine-tune or fusion; None for the base.
        max_new_tokens: at most so many.
        stop: tokens that end the text.
        sampling: how its tokens are chosen.
    """

    tokens: Sequence[int]
    tenant: str | None = None
    max_new_tokens: int = 128
    stop: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    Attributes:
        tokens: new ones, the stop token left out.
        finish_reason: a stop token came, or max_new_tokens were there.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


class ActiveRow:
    """A request at work in a row of the batch; `text` is its prompt and what has come so far."""

    def __init__(self, index: int, request: Request, row: int) -> None:
        """Begins with the prompt."""
        self.index, self.request, self.row = index, request, row
        self.chooser = Chooser(request.sampling)
        self.text = list(request.tokens)

    @property
    def new(self) -> list[int]:
        """Tokens that have come."""
        return self.text[len(self.request.tokens) :]

    def accept(self, token: int, write: Callable[[int, int], None] | None) -> Completion | None:
        """Adds a token; the completion if that was the last one."""
        if token in self.request.stop:
            return Completion(self.new, "stop")
        self.text.append(token)
        if write:
            write(self.index, token)
        full = len(self.text) == len(self.request.tokens) + self.request.max_new_tokens
        return Completion(self.new, "length") if full else None
