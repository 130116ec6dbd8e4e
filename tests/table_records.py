# SPDX-License-Identifier: Apache-2.0
"""Random records of embeddings, lm_head, norms and biases in file order, and what they mean in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from deltaweave.runtime_plugin.library import Record
from factored_records import RandomBand, RandomFactor
from numpy.typing import NDArray

__all__ = ["RandomDense", "RandomRows", "RandomValues", "Shared", "draw_tables"]


@dataclass
class RandomDense:
    """Low-bit rows added to the first ones of a table; `values` [rows, in_features] float64."""

    band: RandomBand
    factor: RandomFactor
    levels: NDArray[np.float32]
    group_size: int | None
    group_offset: int

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        rows: int,
        features: int,
        *,
        bits: int = 8,
        grid: str = "affine",
        group_size: int | None = 128,
        group_offset: int = 0,
    ) -> RandomDense:
        """Rows of about 1/sqrt(features)."""
        band = RandomBand(bits, rows, grid)
        levels = np.sort(rng.standard_normal(1 << bits)).astype(np.float32) if grid == "codebook" else np.zeros(0, "f4")
        factor = RandomFactor.draw(rng, (band,), {0: levels}, features, group_size, group_offset)
        return cls(band, factor, levels, group_size, group_offset)

    @property
    def values(self) -> NDArray[np.float64]:
        """What is added to the base's rows."""
        return self.factor.values

    def shape(self, parameter: int) -> Record:
        """The library's description."""
        return Record.dense(
            parameter, self.band.rank, self.band.bits, self.band.grid, self.group_size, self.group_offset
        )

    def tensors(self) -> dict[str, bytes]:
        """Bytes by the name of their field in RepackArgs."""
        return {"v_codes": self.factor.codes, "v_grid": self.factor.grid, "levels": self.levels.tobytes()}

    def change(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tenant's table from the base's, whose missing rows are zeros."""
        tuned = table.copy()
        tuned[: self.band.rank] += self.values
        return tuned


@dataclass
class RandomRows:
    """fp16 rows that replace those at `indices`."""

    indices: NDArray[np.int32]
    values: NDArray[np.float16]

    @classmethod
    def draw(cls, rng: np.random.Generator, rows: int, total: int, features: int) -> RandomRows:
        """`rows` of `total`, chosen at random."""
        indices = np.sort(rng.choice(total, rows, replace=False)).astype(np.int32)
        return cls(indices, (rng.standard_normal((rows, features)) / np.sqrt(features)).astype(np.float16))

    def shape(self, parameter: int) -> Record:
        """The library's description."""
        return Record.replaced_rows(parameter, len(self.indices))

    def tensors(self) -> dict[str, bytes]:
        """Bytes by the name of their field in RepackArgs."""
        return {"indices": self.indices.tobytes(), "values": self.values.tobytes()}

    def change(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """The tenant's table from the base's."""
        tuned = table.copy()
        tuned[self.indices] = self.values
        return tuned


@dataclass
class RandomValues:
    """A norm weight or bias that replaces the base's."""

    values: NDArray[np.float32]

    def shape(self, parameter: int) -> Record:
        """The library's description."""
        return Record.values(parameter)

    def tensors(self) -> dict[str, bytes]:
        """Bytes by the name of their field in RepackArgs."""
        return {"values": self.values.tobytes()}


@dataclass
class Shared:
    """The record of another parameter of the same tenant."""

    owner: int

    def shape(self, parameter: int) -> Record:
        """The library's description."""
        return Record.shared(parameter, self.owner)

    def tensors(self) -> dict[str, bytes]:
        """None of its own."""
        return {}


def draw_tables(
    rng: np.random.Generator, features: int, base_rows: int, rows: int, group_size: int | None, in_offset: int
) -> list[RandomDense | RandomRows]:
    """Records of every kind for a table of at most `rows` rows: dense ones of several widths, then replaced rows."""
    offset = in_offset if group_size else 0
    dense = [
        RandomDense.draw(rng, count, features, bits=bits, grid=grid, group_size=group_size, group_offset=offset)
        for count, bits, grid in [
            (base_rows, 8, "affine"),
            (rows, 4, "affine"),
            (base_rows - 7, 3, "affine"),
            (base_rows, 2, "affine"),
            (rows, 1, "affine"),
            (base_rows, 8, "codebook"),
            (rows, 3, "codebook"),
        ]
    ]
    return [*dense, *(RandomRows.draw(rng, count, rows, features) for count in (1, 13, rows))]
