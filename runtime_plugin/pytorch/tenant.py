# SPDX-License-Identifier: Apache-2.0
"""From a delta file to what an arena serves: a table of the base's parameters, and a tenant's records for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deltaweave.formats import (
    BaseIdentity,
    BaseRecord,
    Delta,
    DenseRecord,
    FactoredRecord,
    PackedMatrix,
    Record,
    ReplaceRecord,
    RowsRecord,
    apply_record,
)
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.library import Parameter, ParameterKind
from deltaweave.runtime_plugin.pytorch.fit import (
    AttachError,
    generation_settings,
    is_vocabulary,
    require_base,
    require_vocabulary,
    rotary_embedding,
    tuned_config,
)
from deltaweave.runtime_plugin.pytorch.packed import exact_tensor
from torch import nn
from transformers import GenerationConfig

__all__ = ["Content", "ParameterTable", "Rows", "ServedRecord", "Tenant", "load_tenant"]

MAX_RANK = 4096  # DW_MAX_RANK
EMBEDDING, HEAD, ROTARY = "model.embed_tokens.weight", "lm_head.weight", "model.rotary_emb"
# Tokens that a tenant may add to the base's vocabulary where nobody says how many.
SPARE_TOKENS = 256
# Rotary embeddings that follow the length of the text: they cannot be looked up by slot.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Rows:
    """Replaced rows of an embedding or lm_head.

    Attributes:
        indices: int32 [rows], rising.
        values: float16 [rows, in_features].
    """

    indices: torch.Tensor
    values: torch.Tensor


# What a record brings: packed codes, replaced rows, or the values of a norm or bias (float32).
Content = FactoredRecord | DenseRecord | Rows | torch.Tensor


@dataclass(frozen=True)
class ServedRecord:
    """One tenant's record of one parameter.

    Attributes:
        parameter: row of the table.
        content: None if it shares another record's bytes.
        shares: the parameter whose record that is.
    """

    parameter: int
    content: Content | None
    shares: int = -1

    def shape(self) -> library.Record:
        """What the library needs to place it."""
        content = self.content
        if content is None:
            return library.Record.shared(self.parameter, self.shares)
        if isinstance(content, FactoredRecord):
            sizes, offsets = (
                (content.v.group_size, content.u.group_size),
                (content.v.group_offset, content.u.group_offset),
            )
            return library.Record.factored(self.parameter, _bands(content.v), sizes, offsets)
        if isinstance(content, DenseRecord):
            matrix = content.matrix
            [(bits, rows, grid)] = _bands(matrix)
            return library.Record.dense(self.parameter, rows, bits, grid, matrix.group_size, matrix.group_offset)
        if isinstance(content, Rows):
            return library.Record.replaced_rows(self.parameter, len(content.indices))
        return library.Record.values(self.parameter)


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


class ParameterTable:
    """What tenants of a model may change, by the checkpoint's names, in the directory's order."""

    def __init__(self, model: nn.Module, vocabulary: int | None = None) -> None:
        """Lists the linear layers, their biases, the norms and the embeddings of a Hugging Face decoder.

        Args:
            model: holding the base, nothing attached.
            vocabulary: the most tokens that a tenant may have; None for the base's and SPARE_TOKENS more.

        Raises:
            AttachError: not such a model.
        """
        self.model = model
        known = {name: len(parameter) for name, parameter in model.named_parameters()}.get(EMBEDDING, 0)
        self.vocabulary = known + SPARE_TOKENS if vocabulary is None else vocabulary
        self.rotary: Any = dict(model.named_modules()).get(ROTARY)  # an attachment stands in its place
        self._entries: dict[str, BaseParameter] = {}
        self._checked: set[str] = set()
        for name, module in model.named_modules():
            self._list(name, module)
        for name, found in ((EMBEDDING, EMBEDDING in self), (HEAD, HEAD in self), (ROTARY, self.rotary is not None)):
            if not found:
                raise AttachError(f"the model has no {name}: expected a Hugging Face decoder with nothing attached")

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

    def require_base(self, base: BaseIdentity) -> None:
        """Checks the model's values against a delta's base, once for all deltas of the same base."""
        if base.root not in self._checked:
            require_base(self.model, base)
            self._checked.add(base.root)

    def _list(self, name: str, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = ParameterKind.LINEAR if isinstance(module, nn.Linear) else ParameterKind.EMBEDDING
            self._add(f"{name}.weight", kind, module.weight)
            if getattr(module, "bias", None) is not None:
                self._add(f"{name}.bias", ParameterKind.VECTOR, module.bias)
        elif type(module).__name__.endswith("RMSNorm"):
            self._add(f"{name}.weight", ParameterKind.VECTOR, module.weight)

    def _add(self, name: str, kind: ParameterKind, weight: Any) -> None:
        shape = tuple(weight.shape)
        rows = (
            1 if kind == ParameterKind.VECTOR else max(shape[0], self.vocabulary) if is_vocabulary(name) else shape[0]
        )
        self._entries[name] = BaseParameter(len(self._entries), kind, shape, rows)


@dataclass(frozen=True)
class Tenant:
    """A fine-tune that an arena can serve.

    Attributes:
        name: what requests call it.
        path: of its delta.
        records: what it changes.
        vocabulary: its number of tokens.
        inverse_frequencies: of its rotary embedding, float32 [head_dim / 2].
        rotary_scale: what that embedding's sines and cosines are multiplied with.
        generation: its own generation settings, if it brings some.
    """

    name: str
    path: Path
    records: tuple[ServedRecord, ...]
    vocabulary: int
    inverse_frequencies: torch.Tensor
    rotary_scale: float
    generation: GenerationConfig | None

    @cached_property
    def shapes(self) -> list[library.Record]:
        """Of its records, as the library wants them."""
        return [record.shape() for record in self.records]


def load_tenant(table: ParameterTable, delta: Delta, name: str, *, accept_base: bool = False) -> Tenant:
    """Reads a delta as a tenant; large parts stay views of the file.

    Raises:
        AttachError: another base or family, or something that an arena does not serve.
    """
    model: Any = table.model
    tuned = tuned_config(model, delta)
    require_vocabulary(delta, tuned)
    if tuned.vocab_size > table.vocabulary:
        raise AttachError(
            f"{delta.path}: a vocabulary of {tuned.vocab_size}, the arena takes up to {table.vocabulary}; make it with "
            "a larger vocabulary"
        )
    if not accept_base:
        table.require_base(delta.header.base)
    rotary = table.rotary
    if tuned.rope_parameters != model.config.rope_parameters:
        kinds = {settings.rope_parameters["rope_type"] for settings in (tuned, model.config)}
        if kinds & LENGTH_DEPENDENT:
            raise AttachError(f"{delta.path}: rotary embedding {max(kinds)} cannot be served beside others")
        rotary = rotary_embedding(rotary, tuned)
    return Tenant(
        name=name,
        path=delta.path,
        records=tuple(_served_records(table, delta)),
        vocabulary=int(tuned.vocab_size),
        inverse_frequencies=rotary.inv_freq.float().cpu(),
        rotary_scale=float(rotary.attention_scaling),
        generation=generation_settings(delta),
    )


def _served_records(table: ParameterTable, delta: Delta) -> Iterator[ServedRecord]:
    tied = delta.header.architecture.tied
    with ThreadPoolExecutor() as pool:  # decoding checks every grid: numbers to be read, without the GIL
        records = list(pool.map(delta.record, delta.names))
    for name, record in zip(delta.names, records, strict=True):
        content = _content(table, name, record)
        if content is not None:
            yield ServedRecord(table[name].index, content)
        for alias in (alias for alias, owner in tied.items() if owner == name):
            yield from _alias_record(table, alias, name, record, content)
    for alias, owner in tied.items():
        if owner not in delta.names:
            yield from _alias_record(table, alias, owner, BaseRecord(table[owner].shape), None)


def _alias_record(
    table: ParameterTable, alias: str, owner: str, record: Record, content: Content | None
) -> Iterator[ServedRecord]:
    """What a parameter that shares the owner's values gets: its record too, if it means the same on its own base."""
    index, base = table[alias].index, table.model.get_parameter(owner)
    if content is not None and (table.model.get_parameter(alias) is base or _replaces_all(content, record.shape[0])):
        yield ServedRecord(index, None, shares=table[owner].index)
    elif table.model.get_parameter(alias) is not base:
        tuned = apply_record(record, base.detach().float().cpu().numpy())
        yield ServedRecord(index, _all_rows(alias, torch.from_numpy(tuned)))


def _content(table: ParameterTable, name: str, record: Record) -> Content | None:
    """What is served of a record; None if it leaves the base's value."""
    parameter = table[name]
    _require_shape(name, parameter, record)
    if isinstance(record, BaseRecord):
        return None
    if parameter.kind == ParameterKind.VECTOR and isinstance(record, ReplaceRecord):
        return exact_tensor(record.values).float()
    if is_vocabulary(name):
        return _vocabulary_content(name, parameter, record)
    if parameter.kind == ParameterKind.LINEAR and isinstance(record, FactoredRecord):
        return record
    raise AttachError(f"{name}: a {_kind(record)} record is served in lm_head and embeddings only, not there")


def _vocabulary_content(name: str, parameter: BaseParameter, record: Record) -> Content | None:
    if isinstance(record, RowsRecord):
        if not len(record.indices):
            return None
        return Rows(torch.from_numpy(record.indices.copy()), _half(name, exact_tensor(record.values)))
    if isinstance(record, ReplaceRecord):
        return _all_rows(name, exact_tensor(record.values))
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


def _all_rows(name: str, values: torch.Tensor) -> Rows:
    return Rows(torch.arange(len(values), dtype=torch.int32), _half(name, values))


def _replaces_all(content: Content, rows: int) -> bool:
    return isinstance(content, Rows) and len(content.indices) == rows


def _half(name: str, values: torch.Tensor) -> torch.Tensor:
    """Values in fp16, which is what the kernels read; bfloat16 has the smaller mantissa, so it loses nothing there."""
    half = values.half()
    if not bool(half.isfinite().all()):
        raise AttachError(f"{name}: has values beyond float16, which an arena cannot hold")
    return half


def _bands(matrix: PackedMatrix) -> list[tuple[int, int, str]]:
    return [(piece.band.bits, piece.band.rank, piece.band.grid) for piece in matrix.bands]


def _kind(record: Record) -> str:
    return type(record).__name__.removesuffix("Record").lower()
