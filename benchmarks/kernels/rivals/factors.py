# SPDX-License-Identifier: Apache-2.0
"""Random packed factors in the file's order, drawn on the device, and their exact values.

A factor [rank, length] is a list of bands. A band's rows are little-endian bit streams padded to whole bytes, bands
begin at multiples of 16 bytes, and every row has an fp16 (scale, zero) pair for each 128 columns: formats/SPEC.md,
record kind `factored`. value = scale * (code - zero).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import GROUP_SIZE, Band, Slice

__all__ = ["PackedBand", "PackedFactor", "PackedRecord", "draw_records"]


@dataclass(frozen=True)
class PackedBand:
    """One band of a factor: views into its tensors.

    Attributes:
        bits: code width.
        codes: uint8 [rank, ceil(length * bits / 8)].
        grid: float16 [rank, groups, 2], scale and zero.
        length: columns.
    """

    bits: int
    codes: torch.Tensor
    grid: torch.Tensor
    length: int

    def values(self) -> torch.Tensor:
        """float64 [rank, length]."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.codes.device)
        stream = ((self.codes.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : self.length * self.bits]
        weights = 2 ** torch.arange(self.bits, dtype=torch.int32, device=self.codes.device)
        codes = (stream.unflatten(1, (self.length, self.bits)).int() * weights).sum(-1)
        scale, zero = self.grid.double().repeat_interleave(GROUP_SIZE, 1)[:, : self.length].unbind(-1)
        return torch.mul(scale, codes - zero)


@dataclass(frozen=True)
class PackedFactor:
    """One factor: `codes` uint8 and `grid` float16, both flat, as the file holds them."""

    bands: tuple[Band, ...]
    length: int
    codes: torch.Tensor
    grid: torch.Tensor

    @classmethod
    def draw(cls, bands: tuple[Band, ...], length: int, generator: torch.Generator) -> PackedFactor:
        """Uniform codes; values of about 1 / sqrt(length), as orthonormal rows have."""
        device = generator.device
        codes = torch.empty(_code_offsets(bands, length)[-1], dtype=torch.uint8, device=device)
        codes.random_(0, 256, generator=generator)
        pairs = []
        for band in bands:
            top = (1 << band.bits) - 1
            spread = torch.rand((band.rank, -(-length // GROUP_SIZE), 2), generator=generator, device=device)
            scale = (1 + 3 * spread[..., 0]) / (top * length**0.5)
            pairs.append(torch.stack([scale, top * (0.3 + 0.4 * spread[..., 1])], dim=-1).half().flatten())
        return cls(bands, length, codes, torch.cat(pairs))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and grid."""
        return self.codes.nbytes + self.grid.nbytes

    def clone(self) -> PackedFactor:
        """The same content in memory of its own."""
        return PackedFactor(self.bands, self.length, self.codes.clone(), self.grid.clone())

    def packed_bands(self) -> list[PackedBand]:
        """The bands as views."""
        starts = _code_offsets(self.bands, self.length)
        groups = -(-self.length // GROUP_SIZE)
        result, row = [], 0
        for band, start in zip(self.bands, starts, strict=False):
            row_bytes = -(-self.length * band.bits // 8)
            codes = self.codes[start : start + band.rank * row_bytes].view(band.rank, row_bytes)
            grid = self.grid[2 * groups * row : 2 * groups * (row + band.rank)].view(band.rank, groups, 2)
            result.append(PackedBand(band.bits, codes, grid, self.length))
            row += band.rank
        return result

    def values(self) -> torch.Tensor:
        """float64 [rank, length]."""
        return torch.cat([band.values() for band in self.packed_bands()])


@dataclass(frozen=True)
class PackedRecord:
    """A projection's delta: y += ((x V^T) * sigma) U."""

    v: PackedFactor
    u: PackedFactor
    sigma: torch.Tensor

    @classmethod
    def draw(cls, piece: Slice, in_features: int, generator: torch.Generator) -> PackedRecord:
        """A record with falling singular values."""
        v = PackedFactor.draw(piece.bands, in_features, generator)
        u = PackedFactor.draw(piece.bands, piece.out_features, generator)
        fall = torch.exp(-3 * torch.arange(piece.rank, device=generator.device) / piece.rank)
        spread = 0.5 + torch.rand(piece.rank, generator=generator, device=generator.device)
        return cls(v, u, (fall * spread).float())

    @property
    def nbytes(self) -> int:
        """Bytes in the file: codes, grids, sigma."""
        return self.v.nbytes + self.u.nbytes + self.sigma.nbytes

    def clone(self) -> PackedRecord:
        """The same content in memory of its own."""
        return PackedRecord(self.v.clone(), self.u.clone(), self.sigma.clone())

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The delta term of x float64 [tokens, in_features], exactly: float64 [tokens, out_features]."""
        return ((x @ self.v.values().T) * self.sigma.double()) @ self.u.values()


def draw_records(piece: Slice, in_features: int, count: int, seed: int, device: str) -> list[PackedRecord]:
    """`count` different records of one projection."""
    generator = torch.Generator(device).manual_seed(seed)
    return [PackedRecord.draw(piece, in_features, generator) for _ in range(count)]


def _code_offsets(bands: tuple[Band, ...], length: int) -> list[int]:
    """Where each band's codes begin, and the end."""
    offsets, end = [], 0
    for band in bands:
        start = -(-end // 16) * 16
        offsets.append(start)
        end = start + band.rank * (-(-length * band.bits // 8))
    return [*offsets, end]
