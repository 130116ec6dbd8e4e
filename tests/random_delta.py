# SPDX-License-Identifier: Apache-2.0
"""Deltas of random codes for a model of any size, written without the converter."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from deltaweave.formats import (
    Architecture,
    Band,
    BaseIdentity,
    ExactArray,
    Header,
    Record,
    ReplaceRecord,
    RowsRecord,
    TunedInfo,
    factored_bytes,
    write_delta,
)
from op_arena import random_dense, random_factored

__all__ = ["budget_bands", "published_bands", "random_delta"]

LEADING = (Band(8, 2), Band(3, 32))
BANDS = (Band(8, 2), Band(3, 8), Band(2, 30))


def published_bands(shape: tuple[int, int]) -> tuple[Band, ...]:
    """Delta-CoMe's at its ratio of 1/16, which counts the codes alone: 2 ranks of 8 bits, 32 of 3, the rest of 2."""
    bits_a_feature = shape[0] * shape[1] // (shape[0] + shape[1])
    return (*LEADING, Band(2, (bits_a_feature - 112) // 2))


def budget_bands(shape: tuple[int, int]) -> tuple[Band, ...]:
    """Those that `compress --ratio 1/16` chooses, where every byte counts."""
    budget = shape[0] * shape[1] // 8
    ranks = range(1, (published_bands(shape)[2].rank) + 1)
    fits = bisect(ranks, budget, key=lambda rank: factored_bytes(shape, (*LEADING, Band(2, rank)), 128).total)
    return (*LEADING, Band(2, ranks[fits - 1]))


def random_delta(
    path: Path,
    model: Any,
    *,
    seed: int = 0,
    bands: Callable[[tuple[int, int]], Sequence[Band]] = lambda shape: BANDS,
    vocabulary: str = "dense",
    size: float = 0.2,
) -> Path:
    """Writes a fine-tune of all parameters; matrices of one shape share their codes, so that large models are quick.

    Args:
        path: of the delta.
        model: Hugging Face model; only its parameters' names, shapes and norms' values are read.
        seed: of the codes.
        bands: of a projection's shape.
        vocabulary: how embeddings and lm_head change: `dense`, `rows` or `none`.
        size: of the change of a norm or bias.
    """
    generator = np.random.default_rng(seed)
    matrices: dict[tuple[int, ...], Record] = {}
    records: dict[str, Record] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) == 1:
            before = parameter.detach().float().cpu().numpy()
            values = before + size * generator.standard_normal(shape[0]).astype(np.float32)
            records[name] = ReplaceRecord(ExactArray(values, "F32"))
        elif "embed" not in name and "lm_head" not in name:
            if shape not in matrices:
                matrices[shape] = random_factored(generator, shape, bands(shape))
            records[name] = matrices[shape]
        elif vocabulary == "dense":
            records[name] = random_dense(generator, shape)
        elif vocabulary == "rows":
            indices = np.unique(generator.integers(0, shape[0], 9)).astype(np.int32)
            values = 0.3 * generator.standard_normal((len(indices), shape[1])).astype(np.float16)
            records[name] = RowsRecord(shape, indices, ExactArray(values.astype(np.float16), "F16"))
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    digest = "0" * 64
    base = BaseIdentity("random", None, None, digest, digest, {})
    tuned = TunedInfo("random", None, None, "BF16", 2 * sum(parameter.numel() for parameter in model.parameters()))
    header = Header("test", base, tuned, Architecture(model.config.model_type, tied), {"name": "random"})
    return write_delta(path, header, records)
