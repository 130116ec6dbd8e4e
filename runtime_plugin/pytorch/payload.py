# SPDX-License-Identifier: Apache-2.0
"""Records in an arena on the host, where they keep the file's order, and back through the directory.

The directory says where a record's parts lie, as it does on a GPU (deltaweave.h). At a band's V (or U) offset lie its
codes, one row of the file behind the other, and then, 16-byte aligned, its grid; sigma (each band filled up to a
multiple of 16 ranks) and values are float32, levels float16, row indices int32. The kernel order that a GPU's payload
is sized for never takes fewer bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from deltaweave.formats import DenseRecord, FactoredRecord, row_bytes
from deltaweave.runtime_plugin.library import BAND_FIELDS, GRIDS, MAX_EXPERTS, Field, RecordKind
from deltaweave.runtime_plugin.pytorch.packed import DenseDelta, FactoredDelta, PackedRows, RowBand
from deltaweave.runtime_plugin.records import Content, LoraStack, Mix, Rows

__all__ = ["HostRow"]

GRID_ALIGNMENT = 16
RANK_ALIGNMENT = 16


@dataclass(frozen=True)
class HostBand:
    """A band as the directory describes it; offsets are bytes from the arena's beginning."""

    bits: int
    grid: int
    rank: int
    v: int
    u: int
    levels: int


@dataclass(frozen=True)
class HostRow:
    """One row of the directory, and the arena that its offsets lead into.

    Attributes:
        arena: uint8 [bytes], on the CPU.
        fields: the row's numbers.
    """

    arena: torch.Tensor
    fields: Sequence[int]

    @classmethod
    def find(cls, arena: torch.Tensor, directory: torch.Tensor, parameter: int, slot: int) -> HostRow:
        """The row of a parameter and slot; slot -1, the bare base, has an empty one."""
        return cls(arena, [0] * directory.shape[2] if slot < 0 else directory[parameter, slot].tolist())

    @property
    def kind(self) -> RecordKind | None:
        """Of the record; None without one."""
        stored = self.fields[Field.KIND]
        return RecordKind(stored - 1) if stored else None

    def factored(self, shape: tuple[int, int]) -> FactoredDelta:
        """A FACTORED record as the delta of a matrix [out_features, in_features]."""
        sigma = [self._view(start, torch.float32, (band.rank,)) for band, start in self._sigma_places()]
        return FactoredDelta(shape, self._rows("u", shape[0]), self._rows("v", shape[1]), torch.cat(sigma))

    def dense(self, in_features: int) -> DenseDelta:
        """A DENSE record as the delta of a matrix [its rows, in_features]."""
        return DenseDelta((self.fields[Field.ROWS], in_features), self._rows("v", in_features))

    def rows(self, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A ROWS record: (indices [rows] int64, values [rows, in_features] float16)."""
        count = self.fields[Field.ROWS]
        indices = self._view(self.fields[Field.INDICES], torch.int32, (count,))
        return indices.long(), self._view(next(self._bands()).v, torch.float16, (count, in_features))

    def values(self, features: int) -> torch.Tensor:
        """A VALUES record, float32 [features]."""
        return self._view(self.fields[Field.VALUES], torch.float32, (features,))

    def loras(self, shape: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A LORA record of a layer [out_features, in_features], an expert a triple.

        Returns:
            A [rank, in_features] float16, B's columns [rank, out_features] float16, sigma [rank] float32.
        """
        return [
            (
                self._view(band.v, torch.float16, (band.rank, shape[1])),
                self._view(band.u, torch.float16, (band.rank, shape[0])),
                self._view(start, torch.float32, (band.rank,)),
            )
            for band, start in self._sigma_places()
        ]

    def mix(self, hidden_size: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """A MIX record, float32: (the gate's weight [experts, hidden_size] or None, bias [experts], temperature [])."""
        experts = self.fields[Field.ROWS]
        numbers = self._view(self.fields[Field.HEADER], torch.float32, (MAX_EXPERTS + 1,))
        start = self.fields[Field.VALUES]
        weight = self._view(start, torch.float32, (experts, hidden_size)) if start else None
        return weight, numbers[:experts], numbers[-1]

    def _bands(self) -> Iterator[HostBand]:
        for number in range(self.fields[Field.BAND_COUNT]):
            shape, *places = self.fields[Field.BANDS + number * BAND_FIELDS :][:BAND_FIELDS]
            yield HostBand(shape & 255, shape >> 8 & 255, shape >> 16, *places)

    def _sigma_places(self) -> Iterator[tuple[HostBand, int]]:
        """Every band, and where its singular values begin."""
        start = self.fields[Field.SIGMA]
        for band in self._bands():
            yield band, start
            start += 4 * _rounded(band.rank, RANK_ALIGNMENT)

    def _rows(self, side: str, length: int) -> PackedRows:
        """One factor; `side` is u or v."""
        size = self.fields[Field.V_GROUP_SIZE if side == "v" else Field.U_GROUP_SIZE] or None
        offset = self.fields[Field.V_GROUP_OFFSET if side == "v" else Field.U_GROUP_OFFSET]
        bands = tuple(self._row_band(band, getattr(band, side), length, size, offset) for band in self._bands())
        return PackedRows(bands, length, size, offset)

    def _row_band(self, band: HostBand, start: int, length: int, size: int | None, offset: int) -> RowBand:
        if band.bits == 16:
            return RowBand(16, self._view(start, torch.float16, (band.rank, length)), None, None)
        width = row_bytes(band.bits, length)
        entries = (1,) if size is None else (band.rank, -(-(length + offset) // size))
        codebook = band.grid == GRIDS["codebook"]
        shape = entries if codebook else (2,) if size is None else (*entries, 2)
        grid = self._view(_rounded(start + band.rank * width, GRID_ALIGNMENT), torch.float16, shape)
        levels = self._view(band.levels, torch.float16, (1 << band.bits,)).float() if codebook else None
        return RowBand(band.bits, self._view(start, torch.uint8, (band.rank, width)), grid, levels)

    def _view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return self.arena[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def write(self, content: Content) -> None:
        """Fills the payload; the row must be that of a record of the content's shape."""
        if isinstance(content, FactoredRecord):
            delta = FactoredDelta.of(content)
            self._write_rows("v", delta.v)
            self._write_rows("u", delta.u)
            parts = delta.sigma.split([band.rank for band in self._bands()])
            for part, (band, start) in zip(parts, self._sigma_places(), strict=True):
                self._view(start, torch.float32, (band.rank,)).copy_(part)
        elif isinstance(content, DenseRecord):
            self._write_rows("v", DenseDelta.of(content).matrix)
        elif isinstance(content, Rows):
            indices = self._view(self.fields[Field.INDICES], torch.int32, content.indices.shape)
            indices.copy_(torch.from_numpy(content.indices))
            values = self._view(next(self._bands()).v, torch.float16, content.values.shape)
            values.copy_(torch.from_numpy(content.values))
        elif isinstance(content, LoraStack):
            self._write_loras(content)
        elif isinstance(content, Mix):
            numbers = content.numbers()
            self._view(self.fields[Field.HEADER], torch.float32, numbers.shape).copy_(torch.from_numpy(numbers))
            if content.weight is not None:
                weight = self._view(self.fields[Field.VALUES], torch.float32, content.weight.shape)
                weight.copy_(torch.from_numpy(content.weight))
        else:
            self._view(self.fields[Field.VALUES], torch.float32, content.shape).copy_(torch.from_numpy(content))

    def _write_loras(self, content: LoraStack) -> None:
        into = self.loras((content.b[0].shape[1], content.a[0].shape[1]))
        sigmas = torch.from_numpy(content.sigma).split(list(content.ranks))
        for (a, b, sigma), from_a, from_b, from_sigma in zip(into, content.a, content.b, sigmas, strict=True):
            a.copy_(torch.from_numpy(from_a))
            b.copy_(torch.from_numpy(from_b))
            sigma.copy_(from_sigma)

    def _write_rows(self, side: str, source: PackedRows) -> None:
        target = self._rows(side, source.length)
        for band, into, piece in zip(self._bands(), target.bands, source.bands, strict=True):
            into.codes.copy_(piece.codes)
            if into.grid is not None and piece.grid is not None:
                into.grid.copy_(piece.grid)
            if piece.levels is not None:
                self._view(band.levels, torch.float16, (1 << band.bits,)).copy_(piece.levels)


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
