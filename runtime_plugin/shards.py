# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: which part of a parameter a rank holds, and that part of a tenant's records. No torch.

The layout is the usual one: q, k, v, gate and up are cut by outputs (whole heads; a key-value head is repeated where
there are fewer than ranks), o and down by inputs, embeddings and lm_head by rows of the padded vocabulary. Norms, gates
of fusions and the biases behind row-parallel layers are whole everywhere. Outputs of column-parallel shards side by
side, and the sum of row-parallel ones, are what the whole parameter gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from deltaweave.formats import DenseRecord, FactoredRecord, shard
from deltaweave.formats.sharding import Axis
from deltaweave.runtime_plugin.fit import AttachError, is_vocabulary
from deltaweave.runtime_plugin.records import Content, LoraStack, Mix, Rows, ServedRecord

__all__ = ["OFFSET_MULTIPLE", "Cut", "RankLayout", "shard_content", "shard_records"]

# Kernels group features by so many of the whole layer: dw_parameter's offsets are remainders of it.
OFFSET_MULTIPLE = 128
QUERY, KEY_VALUE = ("q_proj",), ("k_proj", "v_proj")
COLUMN, ROW = ("gate_proj", "up_proj"), ("o_proj", "down_proj")


@dataclass(frozen=True)
class Cut:
    """Features [start, stop) of a parameter: of its outputs (its first dimension) or inputs (its second)."""

    axis: Axis
    start: int
    stop: int

    @property
    def extent(self) -> int:
        """Features that are left."""
        return self.stop - self.start

    @property
    def offset(self) -> int:
        """How far the first one lies behind a multiple of 128, as dw_parameter has it."""
        return self.start % OFFSET_MULTIPLE


@dataclass(frozen=True)
class RankLayout:
    """What one rank of a tensor-parallel group holds of a decoder.

    Attributes:
        rank: from 0.
        size: ranks of the group.
        heads: of the whole model's queries.
        key_value_heads: of the whole model.
        head_dim: features of a head.
        vocabulary_multiple: the vocabulary is padded to a multiple of it before it is cut.
    """

    rank: int
    size: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary_multiple: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise AttachError(f"rank {self.rank} of {self.size} ranks")
        few, many = sorted((self.key_value_heads, self.size))
        if self.heads % self.size or many % few:
            raise AttachError(
                f"{self.heads} heads and {self.key_value_heads} key-value heads cannot be cut for {self.size} ranks"
            )

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """The part of a parameter, by its name in the checkpoint; None for all of it.

        Args:
            name: such as `model.layers.0.self_attn.q_proj.weight`.
            shape: of the whole parameter.

        Raises:
            AttachError: features that the ranks cannot share out evenly.
        """
        if self.size == 1:
            return None
        if is_vocabulary(name):
            return self._rows(shape[0])
        layer, _, kind = name.rpartition(".")
        projection = layer.rpartition(".")[2]
        if projection in QUERY:
            return Cut("out", *self._span(self.rank, self.heads // self.size * self.head_dim))
        if projection in KEY_VALUE:
            heads = max(1, self.key_value_heads // self.size)
            replicas = max(1, self.size // self.key_value_heads)
            return Cut("out", *self._span(self.rank // replicas, heads * self.head_dim))
        if projection in COLUMN:
            return Cut("out", *self._even(name, shape[0]))
        if projection in ROW and kind == "weight":
            return Cut("in", *self._even(name, shape[1]))
        return None

    def _rows(self, vocabulary: int) -> Cut:
        padded = -(-vocabulary // self.vocabulary_multiple) * self.vocabulary_multiple
        start, stop = self._even("vocabulary", padded)
        if start >= vocabulary:
            raise AttachError(f"a vocabulary of {vocabulary} leaves rank {self.rank} of {self.size} without rows")
        return Cut("out", start, min(stop, vocabulary))

    def _even(self, name: str, extent: int) -> tuple[int, int]:
        if extent % self.size:
            raise AttachError(f"{name}: {extent} features cannot be cut for {self.size} ranks")
        return self._span(self.rank, extent // self.size)

    @staticmethod
    def _span(index: int, extent: int) -> tuple[int, int]:
        return index * extent, (index + 1) * extent


def shard_records(records: Iterable[ServedRecord], cut_of: Callable[[int], Cut | None]) -> Iterator[ServedRecord]:
    """A rank's part of a tenant's records; those of which nothing is left fall away.

    Args:
        records: of the whole tenant; one that shares another's bytes comes behind it.
        cut_of: the part of a parameter, by its row in the table.
    """
    gone: set[int] = set()
    for record in records:
        cut = cut_of(record.parameter)
        content = record.content if cut is None or record.content is None else shard_content(record.content, cut)
        if content is None and (record.content is not None or record.shares in gone):
            gone.add(record.parameter)
        else:
            yield replace(record, content=content)


def shard_content(content: Content, cut: Cut) -> Content | None:
    """The part of a record's content; None if it is empty, as replaced rows may be."""
    if isinstance(content, (FactoredRecord, DenseRecord)):
        return _shard_matrix(content, cut)
    if isinstance(content, Rows):
        return _shard_rows(content, cut)
    if isinstance(content, LoraStack):
        return _shard_loras(content, cut)
    if isinstance(content, Mix):
        raise AttachError("the gate of a fusion is whole on every rank")
    return np.ascontiguousarray(content[cut.start : cut.stop])


def _shard_matrix(content: FactoredRecord | DenseRecord, cut: Cut) -> Content | None:
    """A tuned vocabulary may have fewer rows than the base's: the last ranks then have less, or nothing, of it."""
    extent = content.shape[0 if cut.axis == "out" else 1]
    if cut.start >= extent:
        return None
    return shard(content, cut.axis, cut.start, min(cut.stop, extent))


def _shard_rows(content: Rows, cut: Cut) -> Rows | None:
    if cut.axis == "in":
        return replace(content, values=np.ascontiguousarray(content.values[:, cut.start : cut.stop]))
    first, last = np.searchsorted(content.indices, [cut.start, cut.stop])
    if first == last:
        return None
    return Rows(content.indices[first:last] - np.int32(cut.start), content.values[first:last])


def _shard_loras(content: LoraStack, cut: Cut) -> LoraStack:
    part = slice(cut.start, cut.stop)
    if cut.axis == "out":
        return replace(content, b=tuple(np.ascontiguousarray(b[:, part]) for b in content.b))
    return replace(content, a=tuple(np.ascontiguousarray(a[:, part]) for a in content.a))
