# SPDX-License-Identifier: Apache-2.0
"""Grids for singular vectors: one per group, rounded to the file's fp16 before any code is chosen.

A grid spans its group's minimum and maximum, or the part of that span with the least squared error.

Both factors are stored as rows, one per singular vector, in groups along the row (formats/SPEC.md). GPTQ sees V with
vectors as rows and U with vectors as columns, hence two quantizers over one grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from deltaweave.formats import Band, PackedBand, PackedMatrix, pack_codes, row_bytes
from torch.nn.functional import pad

__all__ = [
    "GridFit",
    "QuantizedRows",
    "VectorsAsColumns",
    "VectorsAsRows",
    "bits_of_ranks",
    "nearest",
    "pack_octets",
    "round_to_nearest",
]

SMALLEST_SCALE = 2.0**-24  # the least positive fp16
GridFit = Literal["min-max", "squared-error"]
# Shares of a group's span that a fitted grid may cover, the whole of it first: Gaussian values are best served at
# 2 bits by half of it, at 8 bits by nearly all.
SPANS = tuple(1 - step / 24 for step in range(16))


@dataclass
class QuantizedRows:
    """Quantized vectors of one factor.

    Attributes:
        codes: [rank, length] uint8; rows of 16-bit vectors are unused.
        grid: [rank, groups, 2] float16, (scale, zero) of each group.
        values: [rank, length] float32, what codes and grid stand for.
        group_size: codes per group.
    """

    codes: torch.Tensor
    grid: torch.Tensor
    values: torch.Tensor
    group_size: int

    @classmethod
    def empty(cls, rank: int, length: int, group_size: int, device: torch.device) -> QuantizedRows:
        """Room for `rank` vectors."""
        return cls(
            torch.zeros(rank, length, dtype=torch.uint8, device=device),
            torch.zeros(rank, -(-length // group_size), 2, dtype=torch.float16, device=device),
            torch.zeros(rank, length, dtype=torch.float32, device=device),
            group_size,
        )

    def __getitem__(self, rows: slice) -> QuantizedRows:
        return QuantizedRows(self.codes[rows], self.grid[rows], self.values[rows], self.group_size)

    def packed(self, bands: Sequence[Band]) -> PackedMatrix:
        """The file's form of these vectors, cut into `bands`."""
        pieces, start = [], 0
        for band in bands:
            rows = slice(start, start + band.rank)
            start += band.rank
            if band.bits == 16:
                pieces.append(PackedBand(band, _numpy(self.values[rows].half()), None))
            else:
                pieces.append(PackedBand(band, _packed(self.codes[rows], band.bits), _numpy(self.grid[rows])))
        return PackedMatrix(tuple(pieces), self.codes.shape[1], self.group_size)


def bits_of_ranks(bands: Sequence[Band]) -> torch.Tensor:
    """[rank] int64: the bit width of every rank."""
    return torch.tensor([band.bits for band in bands for _ in range(band.rank)], dtype=torch.int64)


def round_to_nearest(
    vectors: torch.Tensor, bits: torch.Tensor, group_size: int, fit: GridFit = "min-max"
) -> QuantizedRows:
    """Quantizes each vector by itself.

    Args:
        vectors: [rank, length] float32.
        bits: [rank] int64.
        group_size: values per grid.
        fit: what grids are fitted to.
    """
    rank, length = vectors.shape
    result = QuantizedRows.empty(rank, length, group_size, vectors.device)
    for width in bits.unique().tolist():
        rows = (bits == width).nonzero().flatten().to(vectors.device)
        if width == 16:
            result.values[rows] = vectors[rows].half().float()
            continue
        codes, result.grid[rows], result.values[rows] = nearest(vectors[rows], width, group_size, fit)
        result.codes[rows] = codes.to(torch.uint8)
    return result


def nearest(
    vectors: torch.Tensor, width: int, group_size: int, fit: GridFit = "min-max"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds vectors to grids of one width; nothing waits for a GPU.

    Args:
        vectors: [rank, length] float32.
        width: bits of a code, at most 8.
        group_size: values per grid.
        fit: what grids are fitted to.

    Returns:
        Codes [rank, length] float32, grids [rank, groups, 2] float16, and values [rank, length] float32.
    """
    length = vectors.shape[1]
    groups = _grouped(vectors, group_size)
    grid = _fit_grid(groups, length, width, fit)
    codes, values = (found.flatten(-2)[:, :length] for found in _on_grid(groups, grid, width))
    return codes, grid, values


class VectorsAsRows:
    """V in GPTQ: vectors are rows, grids are fixed beforehand in natural order, whatever order GPTQ visits in.

    Attributes:
        result: codes and values as they come; the grids.
        exact: [rank] bool, whether a vector is kept in 16 bits.
        most: [rank] float32, its largest code.
        scale: [groups, rank] float32, 1 for a vector kept in 16 bits.
        zero: [groups, rank] float32.
    """

    def __init__(self, vectors: torch.Tensor, bits: torch.Tensor, group_size: int, fit: GridFit = "min-max") -> None:
        """Fits the grids of `vectors` [rank, length] float32 with `bits` [rank]."""
        self.result = round_to_nearest(vectors, bits, group_size, fit)
        bits = bits.to(vectors.device)
        self.exact = bits == 16
        self.most = ((1 << bits.clamp_max(8)) - 1).float()
        grid = self.result.grid.float()
        self.scale, self.zero = grid[..., 0].T.contiguous(), grid[..., 1].T.contiguous()
        self.scale[:, self.exact] = 1

    def quantize(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """Quantizes one input feature's entries [rank] of all vectors."""
        group = column // self.result.group_size
        scale, zero = self.scale[group], self.zero[group]
        codes = torch.minimum((values / scale + zero).round_().clamp_min_(0), self.most)
        quantized = torch.where(self.exact, values.half().float(), scale * (codes - zero))
        self.result.codes[:, column] = codes.to(torch.uint8)
        self.result.values[:, column] = quantized
        return quantized


class VectorsAsColumns:
    """U in GPTQ: vectors are columns, so a vector's grids are fitted to it when GPTQ arrives, errors included.

    Attributes:
        result: codes, values and grids as they come.
        bits: [rank] int64, on the device.
        fit: what grids are fitted to.
    """

    def __init__(
        self, length: int, bits: torch.Tensor, group_size: int, device: torch.device, fit: GridFit = "min-max"
    ) -> None:
        """Room for vectors of `length` with `bits` [rank]."""
        self.fit = fit
        self.result = QuantizedRows.empty(bits.numel(), length, group_size, device)
        self.bits = bits.to(device)
        self._bits: list[int] = bits.tolist()

    def quantize(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """Quantizes one whole singular vector [out_features]."""
        result, bits = self.result, self._bits[column]
        if bits == 16:
            result.values[column] = values.half().float()
            return result.values[column]
        [codes], [grid], [rounded] = nearest(values[None], bits, result.group_size, self.fit)
        result.codes[column], result.grid[column], result.values[column] = codes.to(torch.uint8), grid, rounded
        return result.values[column]


def _fit_grid(groups: torch.Tensor, length: int, bits: int, fit: GridFit) -> torch.Tensor:
    """(scale, zero) float16 [..., groups, 2] of `length` values in zero-padded groups [..., groups, group_size]."""
    if bits == 1:
        # Two levels around zero: the mean magnitude is their least-squares distance from it.
        scale = _storable(2 * groups.abs().sum(-1) / _group_lengths(length, groups.shape[-1], groups.device))
        return torch.stack([scale, torch.full_like(scale, 0.5)], -1)
    grid = _spanning_grid(groups, bits, 1.0)
    if fit == "min-max":
        return grid
    error = _grid_error(groups, grid, bits)
    for span in SPANS[1:]:
        other = _spanning_grid(groups, bits, span)
        other_error = _grid_error(groups, other, bits)
        better = other_error < error
        grid, error = torch.where(better[..., None], other, grid), torch.where(better, other_error, error)
    return grid


def _spanning_grid(groups: torch.Tensor, bits: int, span: float) -> torch.Tensor:
    """The grid between `span` times a group's minimum and `span` times its maximum, zero always included."""
    low, high = span * groups.amin(-1).clamp_max(0), span * groups.amax(-1).clamp_min(0)
    scale = _storable((high - low) / ((1 << bits) - 1))
    zero = (-low / scale.float()).round().clamp(0, (1 << bits) - 1).half()
    return torch.stack([scale, zero], -1)


def _grid_error(groups: torch.Tensor, grid: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared error of each group on its grid. Zeros that fill up the last group cost nothing: a code stands for 0."""
    _, values = _on_grid(groups, grid, bits)
    return (values - groups).square().sum(-1)


def _on_grid(groups: torch.Tensor, grid: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes, and the values that they stand for; float32 [..., groups, group_size]."""
    scale, zero = grid.float().unsqueeze(-2).unbind(-1)
    codes = (groups / scale + zero).round_().clamp_(0, (1 << bits) - 1)
    return codes, scale * (codes - zero)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_min(SMALLEST_SCALE).half()


def _grouped(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Cuts the last axis into groups, the last one filled up with zeros."""
    short = -values.shape[-1] % group_size
    groups: torch.Tensor = pad(values, (0, short)).unflatten(-1, (-1, group_size))
    return groups


def _group_lengths(length: int, group_size: int, device: torch.device) -> torch.Tensor:
    lengths = torch.full((-(-length // group_size),), group_size, dtype=torch.float32, device=device)
    lengths[-1] -= -length % group_size
    return lengths


def _packed(codes: torch.Tensor, bits: int) -> np.ndarray:
    """`pack_codes`, on a GPU before the codes leave it: eight codes are one number of `bits` bytes."""
    if not codes.is_cuda:
        return pack_codes(_numpy(codes), bits)
    return _numpy(pack_octets(codes, bits))


def pack_octets(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack_codes` in PyTorch: [rows, length] uint8 to [rows, row_bytes(bits, length)] uint8."""
    octets = _grouped(codes, 8).long()  # [rows, octets, 8]
    shifts = torch.arange(8, device=codes.device)
    numbers = (octets << (bits * shifts)).sum(-1, keepdim=True)
    packed = (numbers >> (8 * shifts[:bits]) & 255).to(torch.uint8)  # [rows, octets, bits]
    return packed.flatten(1)[:, : row_bytes(bits, codes.shape[1])].contiguous()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
