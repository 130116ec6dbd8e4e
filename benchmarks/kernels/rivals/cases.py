# SPDX-License-Identifier: Apache-2.0
"""What is measured: a group of fused projections at its real size, a number of tokens, a number of tenants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BAND_BITS",
    "BAND_RANK",
    "GROUP_SIZE",
    "MODELS",
    "Band",
    "Case",
    "Group",
    "Slice",
    "band_cases",
    "model_cases",
    "preset_bands",
    "sweep_cases",
]

GROUP_SIZE = 128
BAND_BITS = (1, 2, 3, 4, 8)
BAND_RANK = 1024
SWEEP_TENANTS = (1, 2, 4, 8, 16, 32, 64, 128)
SWEEP_HIDDEN = (1024, 2048, 4096, 8192)
SWEEP_BATCH = 8


@dataclass(frozen=True)
class Band:
    """Consecutive ranks of one bit width."""

    bits: int
    rank: int


@dataclass(frozen=True)
class Slice:
    """One projection of a fused group."""

    out_features: int
    bands: tuple[Band, ...]

    @property
    def rank(self) -> int:
        """Ranks of all bands."""
        return sum(band.rank for band in self.bands)


@dataclass(frozen=True)
class Group:
    """Projections that share their input, and run as one call where a contender can fuse them."""

    name: str
    in_features: int
    slices: tuple[Slice, ...]

    @property
    def out_features(self) -> int:
        """Columns of all slices side by side."""
        return sum(piece.out_features for piece in self.slices)


@dataclass(frozen=True)
class Case:
    """One cell of a table. Token t belongs to tenant t % tenants.

    Attributes:
        table: `models` (a whole model's linears), `bands` (one bit width) or `sweep` (square projections).
        model: the row it belongs to.
        layers: how often the group occurs in the model.
        group: the projections.
        tokens: rows of x.
        tenants: distinct deltas among them.
    """

    table: str
    model: str
    layers: int
    group: Group
    tokens: int
    tenants: int

    @property
    def name(self) -> str:
        """For progress lines."""
        return f"{self.model} {self.group.name}, {self.tokens} tokens of {self.tenants} tenants"


def preset_bands(out_features: int, in_features: int) -> tuple[Band, ...]:
    """The preset 8+3+2 at the published ratio: code bits alone are 1/16 of the matrix's 16-bit bytes."""
    bits_a_row = out_features * in_features // (out_features + in_features)
    return Band(8, 2), Band(3, 32), Band(2, (bits_a_row - 8 * 2 - 3 * 32) // 2)


def _group(name: str, in_features: int, out_features: Sequence[int]) -> Group:
    return Group(name, in_features, tuple(Slice(out, preset_bands(out, in_features)) for out in out_features))


def _decoder(hidden: int, key_value: int, intermediate: int) -> tuple[Group, ...]:
    return (
        _group("qkv", hidden, (hidden, key_value, key_value)),
        _group("o", hidden, (hidden,)),
        _group("gate_up", hidden, (intermediate, intermediate)),
        _group("down", intermediate, (hidden,)),
    )


# Name: decoder layers, and the linears of one.
MODELS: dict[str, tuple[int, tuple[Group, ...]]] = {
    "Llama-2-7B": (32, _decoder(4096, 4096, 11008)),
    "Llama-3-8B": (32, _decoder(4096, 1024, 14336)),
    "Llama-2-13B": (40, _decoder(5120, 5120, 13824)),
}


def model_cases(model: str, tenants: Sequence[int], prefill: Sequence[int]) -> list[Case]:
    """Decode with one token a tenant, and prefill of one tenant, for every group of a model."""
    layers, groups = MODELS[model]
    steps = [(count, count) for count in tenants] + [(tokens, 1) for tokens in prefill]
    return [Case("models", model, layers, group, *step) for step in steps for group in groups]


def band_cases(tenants: Sequence[int]) -> list[Case]:
    """A projection 4096 x 4096 whose delta has one band of rank 1024, at every bit width."""
    return [
        Case(
            "bands", f"{bits} bit", 1, Group("4096x4096", 4096, (Slice(4096, (Band(bits, BAND_RANK),)),)), count, count
        )
        for bits in BAND_BITS
        for count in tenants
    ]


def sweep_cases() -> list[Case]:
    """Square projections with the preset's bands: tenants at 4096 features, then features at 8 tenants."""
    points = [(4096, count) for count in SWEEP_TENANTS]
    points += [(hidden, SWEEP_BATCH) for hidden in SWEEP_HIDDEN if hidden != 4096]
    return [
        Case("sweep", f"{hidden}", 1, _group(f"{hidden}x{hidden}", hidden, (hidden,)), n, n) for hidden, n in points
    ]
