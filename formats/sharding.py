# SPDX-License-Identifier: Apache-2.0
"""Cutting records for tensor parallelism: a shard of a record is a record (SPEC.md, "Groups")."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeVar

import numpy as np
from deltaweave.formats.errors import FormatError
from deltaweave.formats.records import (
    BaseRecord,
    DenseRecord,
    FactoredRecord,
    ReplaceRecord,
    RowsRecord,
)

__all__ = ["Axis", "shard"]

Axis = Literal["out", "in"]


AnyRecord = TypeVar("AnyRecord", FactoredRecord, DenseRecord, RowsRecord, ReplaceRecord, BaseRecord)


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
    shape = (*record.shape[:dimension], stop - start, *record.shape[dimension + 1 :])
    if isinstance(record, FactoredRecord):
        cut = {"u": record.u.columns(start, stop)} if axis == "out" else {"v": record.v.columns(start, stop)}
        return replace(record, shape=shape, **cut)
    if isinstance(record, DenseRecord):
        matrix = record.matrix
        part = matrix.row_range(start, stop) if axis == "out" else matrix.columns(start, stop)
        return replace(record, shape=shape, matrix=part)
    if isinstance(record, RowsRecord):
        return _shard_rows(record, axis, start, stop)
    if isinstance(record, ReplaceRecord):
        data = record.values.data[start:stop] if axis == "out" else record.values.data[:, start:stop]
        return replace(record, values=replace(record.values, data=data))
    return replace(record, shape=shape)


def _shard_rows(record: RowsRecord, axis: Axis, start: int, stop: int) -> RowsRecord:
    indices, data = record.indices, record.values.data
    if axis == "in":
        shape = (record.shape[0], stop - start)
        return replace(record, shape=shape, values=replace(record.values, data=data[:, start:stop]))
    first, last = np.searchsorted(indices, [start, stop])
    values = replace(record.values, data=data[first:last])
    return replace(record, shape=(stop - start, record.shape[1]), indices=indices[first:last] - start, values=values)
