# SPDX-License-Identifier: Apache-2.0
"""Packed matrices as torch tensors: the stored bytes stay as they are, and are unpacked a few rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deltaweave.formats import DenseRecord, ExactArray, FactoredRecord, PackedBand, PackedMatrix
from numpy.typing import NDArray
from torch.nn import functional

__all__ = ["DenseDelta", "FactoredDelta", "PackedRows", "RowBand", "exact_tensor", "unpack_codes"]

# Values unpacked at a time: 4 MiB of float32.
BLOCK_VALUES = 1 << 20


@dataclass(frozen=True)
class RowBand:
    """Rows of one bit width.

    Attributes:
        bits: 1, 2, 3, 4 or 8 bits a code, or 16 for fp16 values.
        codes: [rows, row_bytes] uint8, or [rows, length] float16 for 16 bits.
        grid: float16; affine [rows, groups, 2] of (scale, zero), codebook [rows, groups] of scales, with one group for
            the whole band [2] or [1]; None for 16 bits.
        levels: of a codebook, [2^bits] float32; else None.
    """

    bits: int
    codes: torch.Tensor
    grid: torch.Tensor | None
    levels: torch.Tensor | None

    @classmethod
    def of(cls, piece: PackedBand, device: torch.device | None = None) -> RowBand:
        """Wraps a stored band; on the CPU its bytes are shared, not copied."""
        levels = None if piece.band.levels is None else torch.tensor(piece.band.levels, dtype=torch.float32)
        return cls(
            bits=piece.band.bits,
            codes=_tensor(piece.codes, device),
            grid=None if piece.grid is None else _tensor(piece.grid, device),
            levels=None if levels is None else levels.to(device),
        )

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.codes.shape[0]


@dataclass(frozen=True)
class PackedRows:
    """Bands of rows of one length; the torch side of `formats.PackedMatrix`.

    Attributes:
        bands: in the order of their rows.
        length: values a row.
        group_size: values that share a grid entry; None for one entry for a whole band.
        group_offset: how many values of the first group lie in an earlier shard.
    """

    bands: tuple[RowBand, ...]
    length: int
    group_size: int | None
    group_offset: int = 0

    @classmethod
    def of(cls, matrix: PackedMatrix, device: torch.device | None = None) -> PackedRows:
        """Wraps a stored matrix; on the CPU its bytes are shared, not copied."""
        bands = tuple(RowBand.of(piece, device) for piece in matrix.bands)
        return cls(bands, matrix.length, matrix.group_size, matrix.group_offset)

    @property
    def rows(self) -> int:
        """Rows of all bands."""
        return sum(band.rows for band in self.bands)

    def unpack(self, band: RowBand, rows: slice | torch.Tensor) -> torch.Tensor:
        """Values of some rows of one of the bands.

        Args:
            band: one of `bands`.
            rows: which rows, counted within the band.

        Returns:
            [rows, length] float32: the fp16 values, or scale * (code - zero), or scale * levels[code].
        """
        if band.bits == 16:
            return band.codes[rows].float()
        codes = unpack_codes(band.codes[rows], band.bits, self.length)
        assert band.grid is not None
        if self.group_size is None:
            return _values(codes, band, band.grid.float())
        return self._grouped_values(codes, band, band.grid[rows].float())

    def _grouped_values(self, codes: torch.Tensor, band: RowBand, grid: torch.Tensor) -> torch.Tensor:
        """Cut and short groups are filled up to whole ones, so that the grid broadcasts along each group."""
        assert self.group_size is not None
        count, groups = grid.shape[:2]
        missing = groups * self.group_size - self.group_offset - self.length
        whole = functional.pad(codes, (self.group_offset, missing)).view(count, groups, self.group_size)
        values = _values(whole, band, grid[:, :, None])
        return values.view(count, groups * self.group_size)[:, self.group_offset : self.group_offset + self.length]


@dataclass(frozen=True)
class FactoredDelta:
    """A delta u^T diag(sigma) v; the torch side of `formats.FactoredRecord`.

    Attributes:
        shape: (out_features, in_features).
        u: [rank, out_features].
        v: [rank, in_features], in the same bands as u.
        sigma: [rank] float32.
    """

    shape: tuple[int, int]
    u: PackedRows
    v: PackedRows
    sigma: torch.Tensor

    @classmethod
    def of(cls, record: FactoredRecord, device: torch.device | None = None) -> FactoredDelta:
        """Wraps a record; on the CPU its bytes are shared, not copied, so the delta file stays mapped."""
        return cls(
            shape=record.shape,
            u=PackedRows.of(record.u, device),
            v=PackedRows.of(record.v, device),
            sigma=_tensor(record.sigma, device),
        )

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """A few ranks at a time: (u [ranks, out_features], sigma [ranks], v [ranks, in_features]), float32."""
        first = 0
        for u_band, v_band in zip(self.u.bands, self.v.bands, strict=True):
            for rows in row_blocks(u_band.rows, max(self.shape)):
                sigma = self.sigma[first + rows.start : first + rows.stop]
                yield self.u.unpack(u_band, rows), sigma, self.v.unpack(v_band, rows)
            first += u_band.rows


@dataclass(frozen=True)
class DenseDelta:
    """A quantized delta of a whole matrix; the torch side of `formats.DenseRecord`.

    Attributes:
        shape: (out_features, in_features).
        matrix: one band with a row per output feature.
    """

    shape: tuple[int, int]
    matrix: PackedRows

    @classmethod
    def of(cls, record: DenseRecord, device: torch.device | None = None) -> DenseDelta:
        """Wraps a record; on the CPU its bytes are shared, not copied, so the delta file stays mapped."""
        return cls(shape=record.shape, matrix=PackedRows.of(record.matrix, device))

    def blocks(self) -> Iterator[torch.Tensor]:
        """A few output features at a time, in order: their delta [features, in_features] float32."""
        return (self.matrix.unpack(self.matrix.bands[0], rows) for rows in row_blocks(*self.shape))


def unpack_codes(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Codes from their bit streams.

    Eight codes fill `bits` bytes exactly, so that the code at each of the eight places is found in one byte, or in two
    neighbours, at a fixed shift.

    Args:
        packed: [rows, ceil(bits * length / 8)] uint8; code j of a row is bits [bits * j, bits * (j + 1)) of it, bit k
            being bit k % 8 of byte k // 8.
        bits: 1, 2, 3, 4 or 8.
        length: codes a row.

    Returns:
        [rows, length] uint8.
    """
    if bits == 8:
        return packed
    rows, width = packed.shape
    octets = -(-length // 8)
    octet_bytes = functional.pad(packed, (0, octets * bits - width)).view(rows, octets, bits)
    codes = packed.new_empty(rows, octets, 8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = octet_bytes[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (octet_bytes[:, :, byte + 1] << (8 - shift))
        codes[:, :, place] = code & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :length]


def row_blocks(rows: int, length: int) -> Iterator[slice]:
    """Slices of consecutive rows, each of at most BLOCK_VALUES values (but at least one row)."""
    step = max(1, BLOCK_VALUES // max(1, length))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def exact_tensor(array: ExactArray, device: torch.device | None = None) -> torch.Tensor:
    """Exact values in the dtype that they are stored in; on the CPU their bytes are shared, not copied."""
    tensor = _tensor(array.data, device)
    return tensor.view(torch.bfloat16) if array.dtype == "BF16" else tensor


def _values(codes: torch.Tensor, band: RowBand, grid: torch.Tensor) -> torch.Tensor:
    """Codes to values; the grid broadcasts over the codes, with (scale, zero) along its last axis if it is affine."""
    if band.levels is not None:
        return grid * band.levels[codes.int()]
    return (codes.float() - grid[..., 1]) * grid[..., 0]


def _tensor(array: NDArray[Any], device: torch.device | None) -> torch.Tensor:
    """A view of the array's memory, or its copy on another device."""
    with warnings.catch_warnings():
        # Arrays of a mapped file are read-only, of which torch has no notion; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).to(device)
