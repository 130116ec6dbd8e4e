# SPDX-License-Identifier: Apache-2.0
"""Bits for every singular vector under one byte budget over all projections.

Each projection brings a table: what its singular vectors cost in quality at every bit width. For a price per byte,
every vector takes the width with the least sum of quality lost and bytes paid, which finds the lower convex hull of the
whole model's trade (Lagrange multipliers for discrete choices: Everett, Operations Research 11, 1963). The price is
bisected until the bytes fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from deltaweave.converter.errors import RecipeError
from deltaweave.converter.quantize import GridFit, round_to_nearest
from deltaweave.converter.recipe import BandPlan
from deltaweave.converter.svd import Factors
from deltaweave.formats import Band, factored_bytes

__all__ = ["RELIEF", "Allocation", "DistortionTable", "allocate", "distortion_table", "trade_curve"]

# Tables are measured with rounding to nearest. GPTQ and the correction of U make good most of what it costs, and
# rounding errors average out over a model, while parts that are left out all pull back to the base. Tried in
# docs/method.md.
RELIEF = 0.25

# Kernels cut a band into blocks of 16 ranks and fill the last one up; a matrix this wide has ranks enough not to.
KERNEL_RANKS, WIDE = 16, 1024
MAX_RANK = 4096  # DW_MAX_RANK of cuda/include/deltaweave.h
# Prices: steps of the search for two that enclose the budget, where they end, and how finely they are told apart.
STRIDE, FREE, FINE = 64.0, 1e-30, 1 + 1e-6
CURVE_STEP = 2.0
NO_ENERGY = 1e-30


@dataclass(frozen=True)
class DistortionTable:
    """What the singular vectors of one projection lose at each bit width.

    Attributes:
        shape: (out_features, in_features).
        order: [ranks] int64: the singular vectors by falling importance; their number is a multiple of `step`, but
            for the last few of a matrix.
        distortion: [1 + widths, ranks / step] float64: of a block of `step` vectors when it is left out, then at each
            width. In nats a token if weighed by Fisher information, `power` and `relief` being 1.
        step: vectors that share a width.
    """

    shape: tuple[int, int]
    order: torch.Tensor
    distortion: torch.Tensor
    step: int


@dataclass(frozen=True)
class Allocation:
    """A budget spent.

    Attributes:
        bands: of every projection; no bands where the base does as well.
        total_bytes: of all projections' records.
        distortion: predicted, in the unit of the tables.
    """

    bands: dict[str, BandPlan]
    total_bytes: int
    distortion: float


def distortion_table(
    factors: Factors,
    input_moment: torch.Tensor,
    output_weight: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    fit: GridFit,
    relief: float = 1.0,
    power: float = 1.0,
) -> DistortionTable:
    """Measures one projection's table by rounding its singular vectors to nearest at every width.

    With H the input's second moment and G what an error of the outputs costs, a perturbation E of the weights costs
    tr(G E H E^T) / 2. Vector i, left out, is E = sigma_i u_i v_i^T; quantized, its errors in v and in u add up.
    A `power` below 1 trusts the moments that much less: at 0 a vector counts by its singular value alone.

    Args:
        factors: all singular triplets.
        input_moment: H, [in_features, in_features] float32, per token.
        output_weight: G, [out_features, out_features] float32.
        widths: bit widths to choose from.
        group_size: of the grids.
        fit: of the grids.
        relief: share of rounding's distortion that counts, see `RELIEF`.
        power: of (v H v^T) (u^T G u).
    """
    v, u = factors.v[:MAX_RANK], factors.u.T.contiguous()[:MAX_RANK]
    sigma = factors.sigma[:MAX_RANK].double()
    v_energy, u_energy = _energy(v, input_moment), _energy(u, output_weight)
    importance = sigma.square() * (v_energy * u_energy) ** power
    rows = [importance]
    for width in widths:
        bits = torch.full((len(sigma),), width)
        v_error = _energy(v - round_to_nearest(v, bits, group_size, fit).values, input_moment)
        u_error = _energy(u - round_to_nearest(u, bits, group_size, fit).values, output_weight)
        relative = v_error / v_energy.clamp_min(NO_ENERGY) + u_error / u_energy.clamp_min(NO_ENERGY)
        rows.append(relief * importance * relative)
    distortion = torch.stack(rows).cpu() / 2
    order = distortion[0].argsort(descending=True, stable=True)
    shape = (u.shape[1], v.shape[1])
    step = KERNEL_RANKS if min(shape) >= WIDE else 1
    order = order[: max(step, len(order) // step * step)]
    return DistortionTable(shape, order, _blocks(distortion[:, order], step), step)


def allocate(
    tables: Mapping[str, DistortionTable], widths: Sequence[int], group_size: int, budget: float
) -> Allocation:
    """Spends at most `budget` bytes on all projections so that the sum of distortions is least.

    Raises:
        RecipeError: a budget too small for a single singular vector.
    """
    market = _Market(tables, widths, group_size)
    dear = 1.0
    while (best := market.at(dear)).total_bytes > budget:
        dear *= STRIDE
    cheap = dear
    while cheap > FREE and (found := market.at(cheap)).total_bytes <= budget:
        best, dear, cheap = found, cheap, cheap / STRIDE
    while dear > cheap * FINE:
        price = (cheap * dear) ** 0.5
        found = market.at(price)
        if found.total_bytes <= budget:
            best, dear = found, price
        else:
            cheap = price
    changed = any(float(table.distortion[0].sum()) for table in tables.values())
    if changed and not best.total_bytes:
        raise RecipeError(f"ratio: {int(budget)} bytes for all projections do not hold one singular vector")
    bands = {name: _plan(tables[name], choices, widths) for name, choices in best.choices.items()}
    return Allocation(bands, best.total_bytes, best.distortion)


def trade_curve(
    tables: Mapping[str, DistortionTable], widths: Sequence[int], group_size: int
) -> list[tuple[int, float]]:
    """What bytes buy: (bytes of all projections, distortion) by rising bytes, from nothing to everything there is."""
    market = _Market(tables, widths, group_size)
    price, points = 1.0, [market.at(1.0)]
    while points[0].total_bytes:
        points.insert(0, market.at(price := price * CURVE_STEP))
    price = 1.0
    most = market.at(0.0)
    while price > FREE and points[-1].total_bytes < most.total_bytes:
        points.append(market.at(price := price / CURVE_STEP))
    # Padding lets a dearer price cost a few bytes more now and then; such points are no bargain.
    curve: list[tuple[int, float]] = []
    for point in [*points, most]:
        if not curve or (point.total_bytes > curve[-1][0] and point.distortion < curve[-1][1]):
            curve.append((point.total_bytes, point.distortion))
    return curve


@dataclass(frozen=True)
class _Purchase:
    """What is bought at one price: the choice of every block of every projection."""

    choices: dict[str, torch.Tensor]
    total_bytes: int
    distortion: float


class _Market:
    """All tables, ready to be asked at many prices."""

    def __init__(self, tables: Mapping[str, DistortionTable], widths: Sequence[int], group_size: int) -> None:
        self.tables, self.widths, self.group_size = tables, widths, group_size
        # Of one singular vector left out, then at each width.
        self.costs = {
            name: torch.tensor([0.0, *(_bytes(table.shape, width, group_size) for width in widths)]).double()[:, None]
            for name, table in tables.items()
        }

    def at(self, price: float) -> _Purchase:
        """The best choice of every block where a byte costs `price`."""
        chosen, total, distortion = {}, 0, 0.0
        for name, table in self.tables.items():
            choices = (table.distortion + price * table.step * self.costs[name]).argmin(0)
            chosen[name] = choices
            distortion += float(table.distortion.gather(0, choices[None]).sum())
            bands = _bands(table, choices, self.widths)
            if bands:
                total += factored_bytes(table.shape, bands, self.group_size).total
        return _Purchase(chosen, total, distortion)


def _bands(table: DistortionTable, choices: torch.Tensor, widths: Sequence[int]) -> tuple[Band, ...]:
    """The bands that the choices of blocks make, by falling width."""
    ranks = torch.bincount(choices, minlength=1 + len(widths)) * table.step
    if len(choices):
        ranks[choices[-1]] -= len(choices) * table.step - len(table.order)  # the last block may be a part of one
    counted = zip(ranks[1:].tolist(), widths, strict=True)
    return tuple(Band(width, rank) for rank, width in sorted(counted, key=lambda entry: -entry[1]) if rank)


def _plan(table: DistortionTable, choices: torch.Tensor, widths: Sequence[int]) -> BandPlan:
    """Bands by falling width; within a band vectors stand by falling importance."""
    per_vector = choices.repeat_interleave(table.step)[: len(table.order)]
    order: list[int] = []
    for choice in sorted(range(1, 1 + len(widths)), key=lambda choice: -widths[choice - 1]):
        order += table.order[per_vector == choice].tolist()
    return BandPlan(_bands(table, choices, widths), order=tuple(order))


def _bytes(shape: tuple[int, int], width: int, group_size: int) -> float:
    """Of one singular vector: codes, grids and sigma; padding is counted when the bands are known."""
    groups = sum(-(-length // group_size) for length in shape)
    return sum(-(-width * length // 8) for length in shape) + 4 * groups + 4


def _energy(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """X M x^T of every row x, float64 [rows]."""
    return ((rows @ moment) * rows).sum(1).double().clamp_min(0)


def _blocks(distortion: torch.Tensor, step: int) -> torch.Tensor:
    """Sums of `step` neighbours."""
    return distortion.unflatten(1, (-1, step)).sum(2) if distortion.shape[1] % step == 0 else distortion.sum(1, True)
