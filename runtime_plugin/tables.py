# SPDX-License-Identifier: Apache-2.0
"""From a delta file to what an arena serves: the table of the base's parameters, and a tenant's records. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from deltaweave.formats import (
    BaseRecord,
    Delta,
    DenseRecord,
    ExactArray,
    FactoredRecord,
    Record,
    ReplaceRecord,
    RowsRecord,
    apply_record,
)
from deltaweave.runtime_plugin.fit import AttachError, is_vocabulary
from deltaweave.runtime_plugin.library import Parameter, ParameterKind
from deltaweave.runtime_plugin.records import Content, Rows, ServedRecord
from numpy.typing import NDArray

__all__ = ["BLOCKS", "EMBEDDING", "HEAD", "BaseParameter", "BaseValues", "Table", "served_records"]

MAX_RANK = 4096  # DW_MAX_RANK
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCKS = "model.layers."  # and a number: a decoder block, and the parameter that its gate is


@dataclass(frozen=True)
class BaseParameter:
    """A parameter of the base that tenants may change.

    Attributes:
        index: row of the directory.
        shape: the base's, (rows, columns) or (features,).
        rows: the most that a tenant may bring; of a vocabulary more than the base's.
    """

    index: int
    kind: ParameterKind
    shape: tuple[int, ...]
    rows: int


class Table:
    """What tenants of a base may change, by the checkpoint's names, in the directory's order."""

    def __init__(self, entries: Mapping[str, BaseParameter], vocabulary: int) -> None:
        """`vocabulary`: the most tokens that a tenant may have."""
        self._entries = dict(entries)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> BaseParameter:
        """The parameter of a name.

        Raises:
            AttachError: none of that name.
        """
        if name not in self._entries:
            raise AttachError(f"{name}: the model has no such parameter, so no tenant can change it")
        return self._entries[name]

    @property
    def names(self) -> list[str]:
        """All parameters, in the directory's order."""
        return list(self._entries)

    def name(self, index: int) -> str:
        """The name of a row of the directory."""
        return list(self._entries)[index]

    def shapes(self) -> list[Parameter]:
        """The table as the library wants it."""
        return [
            Parameter(kind=entry.kind, in_features=entry.shape[-1], out_features=entry.rows)
            for entry in self._entries.values()
        ]

    def largest_rank(self) -> int:
        """The rank that no delta of a linear layer exceeds, as far as the kernels go."""
        linear = (entry for entry in self._entries.values() if entry.kind == ParameterKind.LINEAR)
        return min(MAX_RANK, max(min(entry.shape) for entry in linear))


class BaseValues(Protocol):
    """The base behind a table, for parameters that a fine-tune ties and the base does not."""

    def same(self, alias: str, owner: str) -> bool:
        """Whether both names are one tensor of the base."""
        ...

    def read(self, name: str) -> NDArray[np.float32]:
        """The base's values."""
        ...


def served_records(table: Table, delta: Delta, base: BaseValues) -> Iterator[ServedRecord]:
    """What an arena serves of a delta; large parts stay views of the file.

    Raises:
        AttachError: something that an arena does not serve.
    """
    tied = delta.header.architecture.tied
    with ThreadPoolExecutor() as pool:  # decoding checks every grid: numbers to be read, without the GIL
        records = list(pool.map(delta.record, delta.names))
    for name, record in zip(delta.names, records, strict=True):
        content = _content(table, name, record)
        if content is not None:
            yield ServedRecord(table[name].index, content)
        for alias in (alias for alias, owner in tied.items() if owner == name):
            yield from _alias_record(table, base, alias, name, record, content)
    for alias, owner in tied.items():
        if owner not in delta.names:
            yield from _alias_record(table, base, alias, owner, BaseRecord(table[owner].shape), None)


def _alias_record(
    table: Table, base: BaseValues, alias: str, owner: str, record: Record, content: Content | None
) -> Iterator[ServedRecord]:
    """What a parameter that shares the owner's values gets: its record too, if it means the same on its own base."""
    index, same = table[alias].index, base.same(alias, owner)
    if content is not None and (same or _replaces_all(content, record.shape[0])):
        yield ServedRecord(index, None, shares=table[owner].index)
    elif not same:
        yield ServedRecord(index, _all_rows(alias, apply_record(record, base.read(owner))))


def _content(table: Table, name: str, record: Record) -> Content | None:
    """What is served of a record; None if it leaves the base's value."""
    parameter = table[name]
    _require_shape(name, parameter, record)
    if isinstance(record, BaseRecord):
        return None
    if parameter.kind == ParameterKind.VECTOR and isinstance(record, ReplaceRecord):
        return record.values.to_float32()
    if is_vocabulary(name):
        return _vocabulary_content(name, parameter, record)
    if parameter.kind == ParameterKind.LINEAR and isinstance(record, FactoredRecord):
        return record
    raise AttachError(f"{name}: a {_kind(record)} record is served in lm_head and embeddings only, not there")


def _vocabulary_content(name: str, parameter: BaseParameter, record: Record) -> Content | None:
    if isinstance(record, RowsRecord):
        if not len(record.indices):
            return None
        return Rows(record.indices.astype(np.int32), _half(name, record.values))
    if isinstance(record, ReplaceRecord):
        return _all_rows(name, record.values)
    if isinstance(record, FactoredRecord) and parameter.kind == ParameterKind.EMBEDDING:
        raise AttachError(f"{name}: a factored record is served in linear layers only, not in embeddings")
    if isinstance(record, FactoredRecord) and record.shape[0] != parameter.rows:
        raise AttachError(
            f"{name}: a factored record of {record.shape[0]} rows in an arena for a vocabulary of {parameter.rows}; "
            f"make it with vocabulary={record.shape[0]}"
        )
    assert isinstance(record, (FactoredRecord, DenseRecord))
    return record


def _require_shape(name: str, parameter: BaseParameter, record: Record) -> None:
    """Vocabularies may differ in their rows; everything else has the base's shape."""
    if is_vocabulary(name):
        fits = record.shape[1:] == parameter.shape[1:] and record.shape[0] <= parameter.rows
    else:
        fits = tuple(record.shape) == parameter.shape
    if not fits:
        raise AttachError(f"{name}: the model has shape {list(parameter.shape)}, the delta {list(record.shape)}")


def _all_rows(name: str, values: ExactArray | NDArray[Any]) -> Rows:
    half = _half(name, values)
    return Rows(np.arange(len(half), dtype=np.int32), half)


def _replaces_all(content: Content, rows: int) -> bool:
    return isinstance(content, Rows) and len(content.indices) == rows


def _half(name: str, values: ExactArray | NDArray[Any]) -> NDArray[np.float16]:
    """Values in fp16, which is what the kernels read; bfloat16 has the smaller mantissa, so it loses nothing there."""
    if isinstance(values, ExactArray):
        values = values.data if values.dtype == "F16" else values.to_float32()
    with np.errstate(over="ignore"):
        half: NDArray[np.float16] = np.asarray(values, np.float16)
    if not np.isfinite(half).all():
        raise AttachError(f"{name}: has values beyond float16, which an arena cannot hold")
    return half


def _kind(record: Record) -> str:
    return type(record).__name__.removesuffix("Record").lower()
