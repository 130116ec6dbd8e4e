# SPDX-License-Identifier: Apache-2.0
"""Cutting records for tensor parallelism: a shard of a record is a record (SPEC.md, "Groups")."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar, cast

import numpy as np
from deltaweave.formats.errors import FormatError
from deltaweave.formats.records import DenseRecord, FactoredRecord, Record, ReplaceRecord, RowsRecord
from numpy.typing import NDArray

__all__ = ["Axis", "shard"]

Axis = Literal["out", "in"]
AnyRecord = TypeVar("AnyRecord", bound=Record)


def shard(record: AnyRecord, axis: Axis, start: int, stop: int) -> AnyRecord:
    """The part of a record that one rank of a tensor-parallel group needs.

    Args:
        record: of the whole parameter, or a shard to be cut again.
        axis: `out`, the first dimension, for column-parallel projections, their biases and split vocabularies; `in`,
            the second, for row-parallel projections.
        start: first feature.
        stop: one past the last feature.

    Returns:
        A record of the same kind. Groups that the cut goes through keep their grid entries; `group_offset` says how
        many of the first one's values are missing.

    Raises:
        FormatError: an empty range or one outside the parameter, or axis `in` of a vector.
    """
    dimension = 0 if axis == "out" else 1
    if dimension >= len(record.shape) or not 0 <= start < stop <= record.shape[dimension]:
        raise FormatError(f"shard [{start}, {stop}) along {axis} of a parameter of shape {list(record.shape)}")
    return cast(AnyRecord, _cut(record, dimension, start, stop))


def _cut(record: Record, dimension: int, start: int, stop: int) -> Record:
    if isinstance(record, ReplaceRecord):
        return replace(record, values=replace(record.values, data=_slice(record.values.data, dimension, start, stop)))
    if isinstance(record, RowsRecord):
        return _cut_rows(record, dimension, start, stop)
    if isinstance(record, FactoredRecord):
        shape = _cut_shape(record.shape, dimension, stop - start)
        if dimension == 0:
            return replace(record, shape=shape, u=record.u.columns(start, stop))
        return replace(record, shape=shape, v=record.v.columns(start, stop))
    if isinstance(record, DenseRecord):
        cut = record.matrix.row_range if dimension == 0 else record.matrix.columns
        return replace(record, shape=_cut_shape(record.shape, dimension, stop - start), matrix=cut(start, stop))
    return replace(record, shape=(*record.shape[:dimension], stop - start, *record.shape[dimension + 1 :]))


def _cut_shape(shape: tuple[int, int], dimension: int, extent: int) -> tuple[int, int]:
    return (extent, shape[1]) if dimension == 0 else (shape[0], extent)


def _cut_rows(record: RowsRecord, dimension: int, start: int, stop: int) -> RowsRecord:
    rows, columns = record.shape
    indices, data = record.indices, record.values.data
    if dimension == 1:
        return replace(record, shape=(rows, stop - start), values=replace(record.values, data=data[:, start:stop]))
    first, last = np.searchsorted(indices, [start, stop])
    kept = indices[first:last] - np.int32(start)
    return replace(
        record, shape=(stop - start, columns), indices=kept, values=replace(record.values, data=data[first:last])
    )


def _slice(data: NDArray[np.generic], dimension: int, start: int, stop: int) -> NDArray[np.generic]:
    return data[start:stop] if dimension == 0 else data[:, start:stop]
