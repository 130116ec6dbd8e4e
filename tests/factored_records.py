# SPDX-License-Identifier: Apache-2.0
"""Random factored records in file order, and what they mean in float64; written apart from deltaweave.formats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from deltaweave.runtime_plugin.library import Record
from numpy.typing import NDArray

__all__ = ["RandomBand", "RandomFactor", "RandomRecord", "pack_rows"]


def pack_rows(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Rows of little-endian bit streams, each padded to whole bytes."""
    stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").tobytes()


@dataclass(frozen=True)
class RandomBand:
    """What the file says of one band: (bits, rank, grid kind), and levels of a codebook."""

    bits: int
    rank: int
    grid: str = "affine"


@dataclass
class RandomFactor:
    """One factor: `codes` and `grid` tensors as bytes, `values` [rank, length] float64."""

    codes: bytes
    grid: bytes
    values: NDArray[np.float64]

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        bands: tuple[RandomBand, ...],
        levels: dict[int, NDArray[np.float32]],
        length: int,
        group_size: int | None,
        group_offset: int = 0,
    ) -> RandomFactor:
        """Values of about 1/sqrt(length), as orthonormal rows have."""
        codes, grids, values = b"", b"", []
        size = 1.0 / np.sqrt(length)
        for place, band in enumerate(bands):
            codes += bytes(-len(codes) % 16)
            if band.bits == 16:
                exact = (rng.standard_normal((band.rank, length)) * size).astype("<f2")
                codes += exact.tobytes()
                values.append(exact.astype(np.float64))
                continue
            drawn = rng.integers(0, 1 << band.bits, (band.rank, length), dtype=np.uint8)
            codes += pack_rows(drawn, band.bits)
            groups = -(-(length + group_offset) // group_size) if group_size else 1
            shape = (band.rank, groups) if group_size else (1, 1)
            columns = (np.arange(length) + group_offset) // group_size if group_size else np.zeros(length, int)
            top = (1 << band.bits) - 1
            if band.grid == "codebook":
                scale = (size * rng.uniform(0.5, 2.0, shape)).astype("<f2")
                grids += scale.tobytes()
                values.append(scale.astype(np.float64)[:, columns] * levels[place].astype(np.float64)[drawn])
                continue
            scale = (size * rng.uniform(1.0, 4.0, shape) / top).astype("<f2")
            zero = (top * rng.uniform(0.3, 0.7, shape)).astype("<f2")
            grids += np.stack([scale, zero], axis=-1).tobytes()
            spread = scale.astype(np.float64)[:, columns], zero.astype(np.float64)[:, columns]
            values.append(spread[0] * (drawn.astype(np.float64) - spread[1]))
        return cls(codes, grids, np.concatenate(values))


@dataclass
class RandomRecord:
    """A factored record of a matrix [out, in]."""

    bands: tuple[RandomBand, ...]
    v: RandomFactor
    u: RandomFactor
    sigma: NDArray[np.float32]
    levels: NDArray[np.float32]
    group_sizes: tuple[int | None, int | None]
    group_offsets: tuple[int, int]

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        shape: tuple[int, int],
        bands: tuple[RandomBand, ...],
        group_sizes: tuple[int | None, int | None] = (128, 128),
        group_offsets: tuple[int, int] = (0, 0),
    ) -> RandomRecord:
        """A record of shape (out_features, in_features) with falling singular values."""
        levels = {
            place: np.sort(rng.standard_normal(1 << band.bits)).astype(np.float32)
            for place, band in enumerate(bands)
            if band.grid == "codebook"
        }
        rank = sum(band.rank for band in bands)
        v = RandomFactor.draw(rng, bands, levels, shape[1], group_sizes[0], group_offsets[0])
        u = RandomFactor.draw(rng, bands, levels, shape[0], group_sizes[1], group_offsets[1])
        sigma = (np.exp(-3 * np.arange(rank) / rank) * rng.uniform(0.5, 1.5, rank)).astype(np.float32)
        table = np.concatenate([*levels.values(), np.zeros(0, np.float32)])
        return cls(bands, v, u, sigma, table, group_sizes, group_offsets)

    def shape(self, parameter: int) -> Record:
        """The library's description."""
        bands = [(band.bits, band.rank, band.grid if band.bits < 16 else "none") for band in self.bands]
        return Record.factored(parameter, bands, self.group_sizes, self.group_offsets)

    def tensors(self) -> dict[str, bytes]:
        """Bytes by the name of their field in RepackArgs."""
        return {
            "v_codes": self.v.codes,
            "v_grid": self.v.grid,
            "u_codes": self.u.codes,
            "u_grid": self.u.grid,
            "sigma": self.sigma.tobytes(),
            "levels": self.levels.tobytes(),
        }

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The delta term of rows x [tokens, in], [tokens, out]."""
        return ((x @ self.v.values.T) * self.sigma.astype(np.float64)) @ self.u.values
