# SPDX-License-Identifier: Apache-2.0
"""A matrix of codes: bands of rows that share a bit width, groups along the row that share a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from deltaweave.formats.errors import FormatError
from deltaweave.formats.layout import BAND_ALIGNMENT, MAX_BANDS, MAX_EXTENT, MAX_GROUP_SIZE, padded
from deltaweave.formats.packing import CODE_BITS, code_columns, row_bytes, unpack_codes
from numpy.typing import NDArray

__all__ = [
    "Band",
    "ByteCount",
    "GridKind",
    "PackedBand",
    "PackedMatrix",
    "code_width",
    "grid_shape",
    "group_count",
    "matrix_bytes",
]

GridKind = Literal["affine", "codebook", "none"]
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
# Values dequantized at a time: 1 MiB of float32.
BLOCK_VALUES = 1 << 18


@dataclass(frozen=True)
class Band:
    """Consecutive rows of one bit width.

    Attributes:
        bits: 1, 2, 3, 4 or 8 bits a code, or 16 for fp16 values.
        rank: number of rows, at least 1.
        grid: `affine`, `codebook`, or `none` for 16 bits.
        levels: of a codebook, 2^bits numbers that are finite in float32; else None.
    """

    bits: int
    rank: int
    grid: GridKind = "affine"
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (*CODE_BITS, 16):
            raise FormatError(f"band of {self.bits} bits, expected one of {', '.join(map(str, (*CODE_BITS, 16)))}")
        if not 1 <= self.rank <= MAX_EXTENT:
            raise FormatError(f"band of rank {self.rank}, expected at least 1")
        if self.grid not in ("affine", "codebook", "none") or (self.grid == "none") != (self.bits == 16):
            raise FormatError(
                f"band of {self.bits} bits with grid {self.grid!r}: 16 bits have grid 'none', all others a grid"
            )
        if (self.grid == "codebook") != (self.levels is not None):
            raise FormatError("a codebook band, and no other, has levels")
        if self.levels is not None and (
            len(self.levels) != 1 << self.bits or not all(abs(level) <= LARGEST_FLOAT32 for level in self.levels)
        ):
            raise FormatError(
                f"codebook of {self.bits} bits needs {1 << self.bits} levels finite in float32, has {len(self.levels)}"
            )


@dataclass(frozen=True)
class PackedBand:
    """The stored form of a band.

    Attributes:
        band: its bit width and rows.
        codes: [rank, row_bytes] uint8, or [rank, length] float16 for 16 bits.
        grid: float16 [rank, groups, 2] of (scale, zero) if affine, [rank, groups] of scales if codebook, None for
            16 bits; with one group for the whole matrix [2] or [1].
    """

    band: Band
    codes: NDArray[Any]
    grid: NDArray[np.float16] | None

    def __post_init__(self) -> None:
        expected = np.float16 if self.band.bits == 16 else np.uint8
        if self.codes.dtype != expected:
            raise FormatError(f"band of {self.band.bits} bits has codes of {self.codes.dtype}")
        if self.grid is not None and (self.grid.dtype != np.float16 or not np.isfinite(self.grid).all()):
            raise FormatError(f"band of {self.band.bits} bits has scales or zeros that are not finite float16")

    def dequantize_into(self, values: NDArray[np.float32], group_size: int | None, group_offset: int) -> None:
        """Writes the band's values [rank, length] float32, a block of rows at a time so that each stays in cache."""
        rank, length = values.shape
        step = max(1, BLOCK_VALUES // length)
        for start in range(0, rank, step):
            rows = slice(start, min(start + step, rank))
            if self.band.bits == 16:
                values[rows] = self.codes[rows]
                continue
            assert self.grid is not None
            codes = unpack_codes(self.codes[rows].view(np.uint8), self.band.bits, length)
            if group_size is None:
                values[rows] = self._values(codes, self.grid.astype(np.float32))
            else:
                self._block_into(values[rows], codes, self.grid[rows].astype(np.float32), group_size, group_offset)

    def _block_into(
        self,
        values: NDArray[np.float32],
        codes: NDArray[np.uint8],
        grid: NDArray[np.float32],
        group_size: int,
        group_offset: int,
    ) -> None:
        """Values of a few rows; groups of one width lie side by side, so that the grid broadcasts along them."""
        for start, width, first, count in _runs(values.shape[1], group_size, group_offset):
            piece = np.s_[:, start : start + count * width]
            grouped = codes[piece].reshape(len(codes), count, width)
            values[piece] = self._values(grouped, grid[:, first : first + count, None]).reshape(len(codes), -1)

    def _values(self, codes: NDArray[np.uint8], grid: NDArray[np.float32]) -> NDArray[np.float32]:
        """Codes to values; the grid is shaped to broadcast over them, with (scale, zero) last if it is affine."""
        if self.band.levels is not None:
            values = np.asarray(self.band.levels, dtype=np.float32).take(codes)
            values *= grid
            return values
        values = codes.astype(np.float32)
        values -= grid[..., 1]
        values *= grid[..., 0]
        return values


@dataclass(frozen=True)
class PackedMatrix:
    """Bands of rows of one length.

    Attributes:
        bands: at least one, at most 8.
        length: values a row.
        group_size: values that share a grid entry; None for one entry for a whole band.
        group_offset: how many values of the first group lie in an earlier shard.
    """

    bands: tuple[PackedBand, ...]
    length: int
    group_size: int | None
    group_offset: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.bands) <= MAX_BANDS:
            raise FormatError(f"{len(self.bands)} bands, expected 1 to {MAX_BANDS}")
        if not 1 <= self.length <= MAX_EXTENT:
            raise FormatError(f"rows of {self.length} values, expected 1 to {MAX_EXTENT}")
        if self.group_size is not None and not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise FormatError(f"group_size {self.group_size}, expected 1 to {MAX_GROUP_SIZE}")
        if not 0 <= self.group_offset < (self.group_size or 1):
            raise FormatError(f"group_offset {self.group_offset} lies outside its group of {self.group_size}")
        for piece in self.bands:
            band = piece.band
            found = (piece.codes.shape, None if piece.grid is None else piece.grid.shape)
            wanted = (
                (band.rank, code_width(band.bits, self.length)),
                grid_shape(band, self.length, self.group_size, self.group_offset),
            )
            if found != wanted:
                raise FormatError(
                    f"band of {band.bits} bits and rank {band.rank} has codes and grid of shape {found}, "
                    f"expected {wanted}"
                )

    @property
    def rows(self) -> int:
        """Rows of all bands."""
        return sum(piece.band.rank for piece in self.bands)

    def dequantize(self) -> NDArray[np.float32]:
        """[rows, length] float32."""
        values = np.empty((self.rows, self.length), dtype=np.float32)
        start = 0
        for piece in self.bands:
            stop = start + piece.band.rank
            piece.dequantize_into(values[start:stop], self.group_size, self.group_offset)
            start = stop
        return values

    def columns(self, start: int, stop: int) -> PackedMatrix:
        """The same rows cut to columns [start, stop), as a tensor-parallel shard needs them.

        A group that the cut goes through keeps its grid entry, and `group_offset` says how much of it is missing.
        """
        _require_range(start, stop, self.length)
        size = self.group_size
        first = (start + self.group_offset) // size if size else 0
        last = -(-(stop + self.group_offset) // size) if size else 0
        pieces = []
        for piece in self.bands:
            if piece.band.bits == 16:
                codes: NDArray[Any] = np.ascontiguousarray(piece.codes[:, start:stop])
            else:
                codes = code_columns(piece.codes.view(np.uint8), piece.band.bits, self.length, start, stop)
            grid = piece.grid if piece.grid is None or not size else np.ascontiguousarray(piece.grid[:, first:last])
            pieces.append(PackedBand(piece.band, codes, grid))
        return PackedMatrix(tuple(pieces), stop - start, size, (start + self.group_offset) % size if size else 0)

    def row_range(self, start: int, stop: int) -> PackedMatrix:
        """Rows [start, stop), as views; bands that have none of them fall away."""
        _require_range(start, stop, self.rows)
        pieces, first = [], 0
        for piece in self.bands:
            low, high = max(start - first, 0), min(stop - first, piece.band.rank)
            first += piece.band.rank
            if low < high:
                grid = piece.grid if piece.grid is None or self.group_size is None else piece.grid[low:high]
                pieces.append(PackedBand(replace(piece.band, rank=high - low), piece.codes[low:high], grid))
        return PackedMatrix(tuple(pieces), self.length, self.group_size, self.group_offset)


@dataclass(frozen=True)
class ByteCount:
    """Stored bytes of a record.

    Attributes:
        codes: bits of codes and fp16 values, rows rounded up to whole bytes.
        grids: scales and zeros.
        sigma: singular values.
        padding: between bands and behind tensors.
    """

    codes: int = 0
    grids: int = 0
    sigma: int = 0
    padding: int = 0

    @property
    def total(self) -> int:
        """All bytes in the file's data section."""
        return self.codes + self.grids + self.sigma + self.padding

    def __add__(self, other: ByteCount) -> ByteCount:
        return ByteCount(
            self.codes + other.codes,
            self.grids + other.grids,
            self.sigma + other.sigma,
            self.padding + other.padding,
        )


def group_count(length: int, group_size: int, group_offset: int = 0) -> int:
    """Grid entries of a row."""
    return -(-(length + group_offset) // group_size)


def _runs(length: int, group_size: int, group_offset: int) -> Iterator[tuple[int, int, int, int]]:
    """A row as runs of groups of one width: the cut first group, the whole ones, the short last one.

    Yields:
        (first value, width, first group, number of groups).
    """
    head = min(length, group_size - group_offset) if group_offset else 0
    whole, tail = divmod(length - head, group_size)
    start = first = 0
    for width, count in ((head, 1), (group_size, whole), (tail, 1)):
        if width and count:
            yield start, width, first, count
            start, first = start + width * count, first + count


def code_width(bits: int, length: int) -> int:
    """Items of a row of codes as an array holds them: bytes, or fp16 values."""
    return length if bits == 16 else row_bytes(bits, length)


def grid_shape(band: Band, length: int, group_size: int | None, group_offset: int = 0) -> tuple[int, ...] | None:
    """The shape of a band's grid; None for 16 bits."""
    if band.grid == "none":
        return None
    entries = (1,) if group_size is None else (band.rank, group_count(length, group_size, group_offset))
    if band.grid == "codebook":
        return entries
    return (2,) if group_size is None else (*entries, 2)


def matrix_bytes(bands: Sequence[Band], length: int, group_size: int | None, group_offset: int = 0) -> ByteCount:
    """Stored bytes of a matrix: its codes tensor and its grid tensor."""
    codes = stored = grids = 0
    for band in bands:
        own = band.rank * row_bytes(band.bits, length)
        codes += own
        stored = padded(stored, BAND_ALIGNMENT) + own
        grids += 2 * math.prod(grid_shape(band, length, group_size, group_offset) or (0,))
    return ByteCount(codes=codes, grids=grids, padding=padded(stored) - codes + padded(grids) - grids)


def _require_range(start: int, stop: int, extent: int) -> None:
    if not 0 <= start < stop <= extent:
        raise FormatError(f"range [{start}, {stop}) of an extent of {extent}")
