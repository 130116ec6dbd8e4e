# SPDX-License-Identifier: Apache-2.0
"""One subject against one reference, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from deltaweave.evaluation import TextScore, TextTotals, token_slices
from deltaweave.formats import DeltaweaveError
from deltaweave.validation.prompts import TokenizedPrompt
from deltaweave.validation.subject import Outputs, Subject

__all__ = ["Measurement", "PromptScore", "measure"]


@dataclass(frozen=True)
class PromptScore:
    """A prompt.

    Attributes:
        text: over the prompt and its answer.
        reference_perplexity: of the reference over the same tokens.
        divergence: the first new token in which greedy decoding differs, from 0; None if all are the same.
        expected: what the reference writes.
        found: what the subject writes.
    """

    text: TextScore
    reference_perplexity: float
    divergence: int | None
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """All prompts.

    Attributes:
        text: over the tokens of all prompts, as `compare` measures them.
        reference_perplexity: of the reference over the same tokens.
        layers: of each decoder block, the relative norm of its outputs' difference; empty if it cannot be seen.
        prompts: each by itself.
    """

    text: TextScore
    reference_perplexity: float
    layers: tuple[float, ...]
    prompts: tuple[PromptScore, ...]

    @property
    def greedy_match(self) -> float:
        """Share of prompts whose greedy text is the reference's to the last token."""
        return sum(prompt.divergence is None for prompt in self.prompts) / len(self.prompts)

    @property
    def first_divergence(self) -> int | None:
        """The earliest new token, over all prompts, in which greedy decoding differs; None if none does."""
        return min((prompt.divergence for prompt in self.prompts if prompt.divergence is not None), default=None)


def measure(
    reference: Subject,
    subject: Subject,
    prompts: Sequence[TokenizedPrompt],
    most: int,
    stop: Collection[int],
    advance: Callable[[], None] = lambda: None,
) -> Measurement:
    """Runs both over the same tokens: each prompt with its answer, or with what the reference writes.

    Args:
        reference: the fine-tune.
        subject: what stands in for it.
        prompts: at least one.
        most: new tokens of greedy decoding, at most.
        stop: tokens that end a text.
        advance: called after each prompt.

    Raises:
        DeltaweaveError: a text of one token, or a subject with a smaller vocabulary.
    """
    starts = [prompt.tokens for prompt in prompts]
    found = subject.greedy(starts, most, stop)
    totals, layers = TextTotals(), _LayerTotals()
    scores = []
    for prompt, text in zip(prompts, found, strict=True):
        (expected,) = reference.greedy([prompt.tokens], most, stop)
        answer = expected if prompt.answer is None else prompt.answer
        own = _score_text(reference, subject, [*prompt.tokens, *answer], layers)
        totals.merge(own)
        difference = _divergence(expected, text)
        scores.append(PromptScore(own.score(), own.reference_perplexity, difference, tuple(expected), tuple(text)))
        advance()
    return Measurement(totals.score(), totals.reference_perplexity, layers.errors(), tuple(scores))


def _score_text(reference: Subject, subject: Subject, tokens: Sequence[int], layers: _LayerTotals) -> TextTotals:
    if len(tokens) < 2:
        raise DeltaweaveError("a prompt of one token to which the fine-tune adds none has nothing to be scored")
    expected, found = reference.outputs(tokens), subject.outputs(tokens)
    vocabulary, place = expected.logits.shape[1], expected.logits.device
    if found.logits.shape[1] < vocabulary:
        raise DeltaweaveError(f"the vocabulary has {found.logits.shape[1]} tokens, the fine-tune's {vocabulary}")
    layers.add(expected, found)
    totals, targets = TextTotals(), torch.tensor(list(tokens[1:]), device=place)
    for part in token_slices(len(targets), vocabulary):
        logits = found.logits[:-1][part, :vocabulary].to(place)
        totals.add(expected.logits[:-1][part], logits, targets[part])
    return totals


class _LayerTotals:
    """Squared norms by decoder block."""

    def __init__(self) -> None:
        self._sums: list[list[float]] = []

    def add(self, expected: Outputs, found: Outputs) -> None:
        """Adds one text; nothing if the subject shows no layers."""
        if not found.layers:
            return
        if len(found.layers) != len(expected.layers):
            raise DeltaweaveError(f"{len(found.layers)} decoder blocks, the fine-tune has {len(expected.layers)}")
        self._sums = self._sums or [[0.0, 0.0] for _ in expected.layers]
        for sums, wanted, got in zip(self._sums, expected.layers, found.layers, strict=True):
            wide = wanted.double()
            sums[0] += float((got.to(wide) - wide).square().sum())
            sums[1] += float(wide.square().sum())

    def errors(self) -> tuple[float, ...]:
        """Relative error of each block."""
        return tuple(math.sqrt(difference / size) if size else 0.0 for difference, size in self._sums)


def _divergence(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """The first place in which two texts differ; one that ends earlier differs where it ends."""
    for place, pair in enumerate(zip(expected, found, strict=False)):
        if pair[0] != pair[1]:
            return place
    return None if len(expected) == len(found) else min(len(expected), len(found))
