# SPDX-License-Identifier: Apache-2.0
"""Scores over a text: perplexity, and how far a candidate's next-token distribution is from the fine-tune's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from deltaweave.formats import DeltaweaveError

__all__ = ["TextScore", "load_text", "score_text"]

# Logits held at a time, per model: 2^25 float32 numbers are 128 MiB.
LOGITS = 1 << 25


@dataclass(frozen=True)
class TextScore:
    """A candidate against the fine-tune over the same tokens.

    Attributes:
        tokens: predicted tokens.
        perplexity: of the candidate.
        kl: KL(fine-tune || candidate) per token, in nats.
        kl_error: standard error of `kl` over sequences.
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
    """Runs both models over the same sequences [sequences, length].

    Args:
        reference: the fine-tune.
        candidate: what stands in for it; may be the fine-tune itself.
        sequences: token ids, at least two per sequence.
    """
    vocabulary = int(reference.config.vocab_size)
    step = max(1, LOGITS // (vocabulary * sequences.shape[1]))
    totals = _Totals()
    for piece in sequences.split(step):
        expected = _logits(reference, piece)
        found = expected if candidate is reference else _logits(candidate, piece)
        totals.add(expected, found[..., : expected.shape[-1]], piece[:, 1:])
    return totals.score()


def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens.to(model.device), use_cache=False).logits[:, :-1]
    return logits.float()


class _Totals:
    """Sums over sequences."""

    def __init__(self) -> None:
        self.loss = self.agreed = self.difference = self.size = 0.0
        self.divergences: list[float] = []
        self.tokens = 0

    def add(self, expected: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> None:
        targets = targets.to(found.device)
        if found.shape[-1] < expected.shape[-1]:  # a base without the fine-tune's added tokens never predicts them
            missing = expected.shape[-1] - found.shape[-1]
            found = torch.nn.functional.pad(found, (0, missing), value=float(found.min()) - 1e4)
        self.loss += float(cross_entropy(found.flatten(0, 1), targets.flatten(), reduction="sum"))
        self.tokens += targets.numel()
        self.agreed += float((expected.argmax(-1) == found.argmax(-1)).sum())
        log_expected, log_found = expected.log_softmax(-1), found.log_softmax(-1)
        divergence = (log_expected.exp() * (log_expected - log_found)).sum(-1)
        self.divergences += divergence.double().mean(-1).tolist()
        centred = expected - expected.mean(-1, keepdim=True)
        difference = found - found.mean(-1, keepdim=True) - centred
        self.difference += float(difference.double().square().sum())
        self.size += float(centred.double().square().sum())

    def score(self) -> TextScore:
        divergences = torch.tensor(self.divergences, dtype=torch.float64)
        spread = float(divergences.std()) / math.sqrt(len(divergences)) if len(divergences) > 1 else 0.0
        return TextScore(
            tokens=self.tokens,
            perplexity=math.exp(min(self.loss / self.tokens, 700.0)),
            kl=max(0.0, float(divergences.mean())),
            kl_error=spread,
            top1=self.agreed / self.tokens,
            logit_error=math.sqrt(self.difference / self.size) if self.size else 0.0,
        )
