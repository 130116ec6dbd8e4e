# SPDX-License-Identifier: Apache-2.0
"""What becomes of everything that is not a projection: norms, biases, embeddings, lm_head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from deltaweave.converter.checkpoint import (
    EMBEDDING,
    HEAD,
    STORED_NAMES,
    Checkpoint,
    require_finite,
)
from deltaweave.converter.quantize import round_to_nearest
from deltaweave.formats import (
    Band,
    BaseRecord,
    DenseRecord,
    ExactArray,
    PackedBand,
    PackedMatrix,
    Record,
    ReplaceRecord,
    RowsRecord,
    dense_bytes,
)

__all__ = ["EmbeddingPolicy", "Policies", "other_bytes", "other_record"]

EmbeddingPolicy = Literal["auto", "exact", "8bit", "base"]
# `auto` stores changed rows exactly up to this share of all rows.
FEW_ROWS = 0.05
# Rows handled at a time: 4096 rows of width 8192 are 128 MiB in float32.
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Policies:
    """Choices for the matrices with a row per token.

    Attributes:
        embeddings: for the input embeddings (and a tied lm_head).
        lm_head: for an untied lm_head.

    `auto` leaves unchanged rows out, stores changed ones exactly if they are few (under 5 %), and else quantizes the
    delta to 8 bits; `exact` stores every changed row; `base` keeps the base's values.
    """

    embeddings: EmbeddingPolicy = "auto"
    lm_head: EmbeddingPolicy = "auto"

    def exactly(self) -> Policies:
        """The same with `exact` for `auto`."""
        return Policies(
            "exact" if self.embeddings == "auto" else self.embeddings,
            "exact" if self.lm_head == "auto" else self.lm_head,
        )


def other_record(base: Checkpoint, tuned: Checkpoint, name: str, policies: Policies, group_size: int) -> Record | None:
    """The record of a tensor that is not a projection; None where it equals the base's.

    Raises:
        CheckpointError: NaN or infinite values.
    """
    if name == EMBEDDING:
        return _embedding_record(base, tuned, name, policies.embeddings, group_size)
    if name == HEAD:
        return _embedding_record(base, tuned, name, policies.lm_head, group_size)
    return _exact_record(base, tuned, name)


def other_bytes(base: Checkpoint, tuned: Checkpoint, name: str, policies: Policies, group_size: int) -> int:
    """About how many bytes the record of `other_record` will take, without making it."""
    shape = tuned.shape(name)
    if name not in (EMBEDDING, HEAD):
        return 0 if _exact_record(base, tuned, name) is None else torch.Size(shape).numel() * tuned.dtype(name).itemsize
    policy = policies.embeddings if name == EMBEDDING else policies.lm_head
    changed = len(_changed_rows(base, tuned, name))
    if policy == "base" or not changed:
        return 0
    if _stores_rows(policy, changed, shape[0]):
        return changed * (shape[1] * tuned.dtype(name).itemsize + 4)
    return dense_bytes((shape[0], shape[1]), 8, group_size).total


def _stores_rows(policy: EmbeddingPolicy, changed: int, rows: int) -> bool:
    return policy == "exact" or (policy == "auto" and changed < FEW_ROWS * rows)


def _exact_record(base: Checkpoint, tuned: Checkpoint, name: str) -> Record | None:
    values = require_finite(tuned.tensor(name), name, tuned.folder)
    origin = base.resolve(name)
    if origin and base.shape(origin) == tuple(values.shape):
        before = base.tensor(origin)
        if torch.equal(before.float(), values.float()):
            return None
    return ReplaceRecord(_exact_array(values))


def _embedding_record(
    base: Checkpoint, tuned: Checkpoint, name: str, policy: EmbeddingPolicy, group_size: int
) -> Record | None:
    """The record of a matrix with a row per token; reads both matrices in blocks of rows."""
    shape = tuned.shape(name)
    changed = _changed_rows(base, tuned, name)
    if not len(changed) and _base_rows(base, name) == shape[0]:
        return None
    if policy == "base":
        return BaseRecord((shape[0], shape[1]))
    if _stores_rows(policy, len(changed), shape[0]):
        return _rows_record(tuned, name, changed)
    return _low_bit_record(base, tuned, name, group_size)


def _exact_array(values: torch.Tensor) -> ExactArray:
    """A tensor's values bit for bit; bfloat16 as uint16 patterns, which numpy can hold."""
    stored = STORED_NAMES[values.dtype]
    data = values.contiguous().view(torch.uint16) if stored == "BF16" else values.contiguous()
    return ExactArray(data.numpy(), stored)


def _base_rows(base: Checkpoint, name: str) -> int:
    origin = base.resolve(name)
    return base.shape(origin)[0] if origin else 0


def _delta_rows(base: Checkpoint, tuned: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of tuned minus base in float32; rows that the base lacks count as zero there."""
    values = require_finite(tuned.rows(name, start, stop), name, tuned.folder).float()
    origin = base.resolve(name)
    shared = min(stop, _base_rows(base, name)) - start
    if origin and shared > 0:
        values = values.clone()
        values[:shared] -= require_finite(base.rows(origin, start, start + shared), origin, base.folder).float()
    return values


def _changed_rows(base: Checkpoint, tuned: Checkpoint, name: str) -> torch.Tensor:
    """Indices of rows that differ from the base's, all added rows among them."""
    rows, known = tuned.shape(name)[0], _base_rows(base, name)
    changed = []
    for start in range(0, rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        differs = _delta_rows(base, tuned, name, start, stop).any(1)
        differs[max(0, known - start) :] = True
        changed.append(differs.nonzero().flatten() + start)
    return torch.cat(changed)


def _rows_record(tuned: Checkpoint, name: str, changed: torch.Tensor) -> RowsRecord:
    shape = tuned.shape(name)
    values = tuned.tensor(name)[changed]
    return RowsRecord((shape[0], shape[1]), changed.to(torch.int32).numpy(), _exact_array(values))


def _low_bit_record(base: Checkpoint, tuned: Checkpoint, name: str, group_size: int) -> DenseRecord:
    rows, columns = tuned.shape(name)
    codes = np.empty((rows, columns), dtype=np.uint8)
    grid = np.empty((rows, -(-columns // group_size), 2), dtype=np.float16)
    error = energy = 0.0
    for start in range(0, rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        delta = _delta_rows(base, tuned, name, start, stop)
        quantized = round_to_nearest(delta, torch.full((stop - start,), 8, dtype=torch.int64), group_size)
        codes[start:stop], grid[start:stop] = quantized.codes.numpy(), quantized.grid.numpy()
        error += float((delta - quantized.values).double().square().sum())
        energy += float(delta.double().square().sum())
    matrix = PackedMatrix((PackedBand(Band(8, rows), codes, grid),), columns, group_size)
    return DenseRecord((rows, columns), matrix, {"weight_error": (error / energy) ** 0.5 if energy else 0.0})
