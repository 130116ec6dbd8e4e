# SPDX-License-Identifier: Apache-2.0
"""Scores over a text: perplexity, and how far a candidate's next-token distribution is from the fine-tune's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaweave.formats import DeltaweaveError

__all__ = ["TextScore", "TextTotals", "load_text", "score_text", "token_slices"]

# Tokens run through the models at a time, and logits held at a time: 2^24 float64 numbers are 128 MiB, of which a few
# are alive at once. A vocabulary of 150 thousand is scored 111 tokens at a time.
TOKENS = 1 << 12
LOGITS = 1 << 24
# Neighbouring tokens are no independent samples: the standard error is taken over blocks of this many.
BLOCK = 32


@dataclass(frozen=True)
class TextScore:
    """A candidate against the fine-tune over the same tokens.

    Attributes:
        tokens: predicted tokens.
        perplexity: of the candidate.
        kl: KL(fine-tune || candidate) per token, in nats.
        kl_error: standard error of `kl`, over blocks of 32 consecutive tokens.
        top1: share of tokens whose most likely next token is the fine-tune's.
        logit_error: relative norm of the logits' difference, each token's mean logit removed.
    """

    tokens: int
    perplexity: float
    kl: float
    kl_error: float
    top1: float
    logit_error: float


def load_text(path: str | Path, tokenizer: Any, sequence_length: int, most: int) -> torch.Tensor:
    """Cuts a text into at most `most` sequences, [sequences, sequence_length] int64.

    Raises:
        DeltaweaveError: an unreadable text, or one shorter than a sequence.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaweaveError(f"{path}: not readable as UTF-8 text ({error})") from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(most, len(tokens) // sequence_length)
    if not count:
        raise DeltaweaveError(f"{path}: holds {len(tokens)} tokens, fewer than one sequence of {sequence_length}")
    return torch.tensor(tokens[: count * sequence_length]).view(count, sequence_length)


@torch.no_grad()
def score_text(reference: PreTrainedModel, candidate: PreTrainedModel, sequences: torch.Tensor) -> TextScore:
    """Runs both models over the same sequences.

    Args:
        reference: the fine-tune.
        candidate: what stands in for it; may be the fine-tune itself.
        sequences: [sequences, length] token ids, at least two a sequence.

    Raises:
        DeltaweaveError: the models have different vocabularies.
    """
    expected_head, found_head = reference.get_output_embeddings(), candidate.get_output_embeddings()
    vocabulary = expected_head.out_features
    if found_head.out_features != vocabulary:
        raise DeltaweaveError(f"the candidate's vocabulary has {found_head.out_features} tokens, not {vocabulary}")
    totals = TextTotals()
    for piece in sequences.split(max(1, TOKENS // sequences.shape[1])):
        expected = _hidden_states(reference, piece)
        found = expected if candidate is reference else _hidden_states(candidate, piece)
        targets = piece[:, 1:].flatten().to(found.device)
        for tokens in token_slices(len(targets), vocabulary):
            totals.add(expected_head(expected[tokens]), found_head(found[tokens]), targets[tokens])
    return totals.score()


def _hidden_states(model: PreTrainedModel, sequences: torch.Tensor) -> torch.Tensor:
    """What lm_head is given at every position that has a next token, [tokens, hidden_size]."""
    states: torch.Tensor = model.base_model(sequences.to(model.device), use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1)


def token_slices(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Tokens in parts whose logits fit into memory at a time."""
    step = max(1, LOGITS // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, start + step)


class TextTotals:
    """Sums over tokens, from which every score of a text follows."""

    def __init__(self) -> None:
        self._loss = self._reference_loss = self._agreed = self._difference = self._size = 0.0
        self._divergences: list[torch.Tensor] = []

    def add(self, expected: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds logits [tokens, vocabulary] of the fine-tune and a candidate, and the tokens [tokens] that came next."""
        log_expected, log_found = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        self._loss -= float(log_found.gather(-1, targets[:, None]).sum())
        self._reference_loss -= float(log_expected.gather(-1, targets[:, None]).sum())
        self._agreed += float((expected.argmax(-1) == found.argmax(-1)).sum())
        self._divergences.append((log_expected.exp() * (log_expected - log_found)).sum(-1).cpu())
        # Log-probabilities differ from logits by a constant per token, which the centring takes away.
        centred = log_expected - log_expected.mean(-1, keepdim=True)
        difference = log_found - log_found.mean(-1, keepdim=True) - centred
        self._difference += float(difference.square().sum())
        self._size += float(centred.square().sum())

    def merge(self, other: TextTotals) -> None:
        """Adds another text's sums."""
        self._loss += other._loss
        self._reference_loss += other._reference_loss
        self._agreed += other._agreed
        self._difference += other._difference
        self._size += other._size
        self._divergences += other._divergences

    @property
    def reference_perplexity(self) -> float:
        """Perplexity of the fine-tune over the same tokens."""
        return _perplexity(self._reference_loss, self._tokens)

    @property
    def _tokens(self) -> int:
        return sum(map(len, self._divergences))

    def score(self) -> TextScore:
        """The candidate's scores; not a number where its logits are none."""
        divergences = torch.cat(self._divergences)
        return TextScore(
            tokens=self._tokens,
            perplexity=_perplexity(self._loss, self._tokens),
            kl=float(divergences.mean().clamp_min(0)),  # which keeps NaN, as max(0.0, ...) does not
            kl_error=_standard_error(divergences),
            top1=self._agreed / self._tokens,
            logit_error=math.sqrt(self._difference / self._size) if self._size else 0.0,
        )


def _perplexity(loss: float, tokens: int) -> float:
    return math.exp(min(loss / tokens, 700.0))


def _standard_error(values: torch.Tensor) -> float:
    """Of the mean of a series whose neighbours resemble each other."""
    blocks = torch.stack([block.mean() for block in values.split(BLOCK)])
    samples = blocks if len(blocks) > 1 else values
    return float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else 0.0
