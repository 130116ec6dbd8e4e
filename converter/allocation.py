# SPDX-License-Identifier: Apache-2.0
"""Bits for every singular vector under one byte budget over all projections.

Each projection brings a table: what its singular vectors cost in quality at every bit width. For a price per byte,
every vector takes the width with the least sum of quality lost and bytes paid, which finds the lower convex hull of the
whole model's trade (Lagrange multipliers for discrete choices: Everett, Operations Research 11, 1963). The price is
bisected until the bytes fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from deltaweave.converter.errors import RecipeError
from deltaweave.converter.quantize import GridFit, nearest
from deltaweave.converter.recipe import BandPlan
from deltaweave.converter.svd import Factors
from deltaweave.formats import Band, factored_bytes
from numpy.typing import NDArray

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
    if v.is_cuda:
        input_moment, output_weight = input_moment.bfloat16(), output_weight.bfloat16()
    v_energy, u_energy = _energy(v, input_moment), _energy(u, output_weight)
    importance = sigma.square() * (v_energy * u_energy) ** power
    rows = [importance]
    for width in widths:
        v_error = _rounding_energy(v, input_moment, width, group_size, fit)
        u_error = _rounding_energy(u, output_weight, width, group_size, fit)
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
    return Allocation(market.plans(best.price), best.total_bytes, best.distortion)


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
    """What is bought at one price."""

    price: float
    total_bytes: int
    distortion: float


class _Market:
    """All tables, ready to be asked at many prices."""

    def __init__(self, tables: Mapping[str, DistortionTable], widths: Sequence[int], group_size: int) -> None:
        self.offers = {name: _Offers(table, widths, group_size) for name, table in tables.items()}

    def at(self, price: float) -> _Purchase:
        """The best choice of every block where a byte costs `price`."""
        bought = [offers.at(price) for offers in self.offers.values()]
        return _Purchase(price, sum(stored for stored, _ in bought), sum(lost for _, lost in bought))

    def plans(self, price: float) -> dict[str, BandPlan]:
        """The bands that are bought at a price."""
        return {name: offers.plan(price) for name, offers in self.offers.items()}


class _Offers:
    """One table, sorted by the prices at which each width is the best choice of a block.

    As a byte gets cheaper, a block goes from being left out to ever wider codes. Width w, costing c_w and losing d_w,
    is its best choice from the price max over wider v of (d_w - d_v) / (c_v - c_w) up to, but not at, the price
    min over narrower v of (d_v - d_w) / (c_w - c_v).
    """

    def __init__(self, table: DistortionTable, widths: Sequence[int], group_size: int) -> None:
        self.table, self.group_size = table, group_size
        rising = sorted(range(len(widths)), key=lambda index: widths[index])
        self.widths = [0, *(widths[index] for index in rising)]
        lost = table.distortion[[0, *(1 + index for index in rising)]].numpy()
        costs = np.array([0.0, *(table.step * _bytes(table.shape, width, group_size) for width in self.widths[1:])])
        self.low, self.high = np.full_like(lost, -np.inf), np.full_like(lost, np.inf)
        for narrow, wide in itertools.combinations(range(len(self.widths)), 2):
            price = (lost[narrow] - lost[wide]) / (costs[wide] - costs[narrow])
            self.low[narrow] = np.maximum(self.low[narrow], price)
            self.high[wide] = np.minimum(self.high[wide], price)
        self._sorted = []  # of each width: prices that end and that begin its blocks' ranges, what those lose so far
        for low, high, distortion in zip(self.low, self.high, lost, strict=True):
            real = low < high
            self._sorted.append([_falling(ends[real], distortion[real]) for ends in (high, low)])

    def at(self, price: float) -> tuple[int, float]:
        """(bytes, distortion) of the best choices at a price."""
        counts, distortion = [], 0.0
        for (highs, lost_below), (lows, lost_above) in self._sorted:
            begun = int(np.searchsorted(highs, -price, side="left"))  # high > price
            ended = int(np.searchsorted(lows, -price, side="left"))  # low > price
            counts.append(begun - ended)
            distortion += float(lost_below[begun] - lost_above[ended])
        bands = _bands(self.table, counts, self.widths, lambda choice: bool(self._chosen(choice, price)[-1]))
        return (factored_bytes(self.table.shape, bands, self.group_size).total if bands else 0), distortion

    def plan(self, price: float) -> BandPlan:
        """Bands by falling width; within a band vectors stand by falling importance."""
        chosen = [self._chosen(choice, price) for choice in range(len(self.widths))]
        order: list[int] = []
        for blocks in reversed(chosen[1:]):
            vectors = torch.from_numpy(blocks).repeat_interleave(self.table.step)[: len(self.table.order)]
            order += self.table.order[vectors].tolist()
        counts = [int(blocks.sum()) for blocks in chosen]
        return BandPlan(_bands(self.table, counts, self.widths, lambda c: bool(chosen[c][-1])), order=tuple(order))

    def _chosen(self, choice: int, price: float) -> NDArray[np.bool_]:
        """[blocks]: whose best choice this is."""
        chosen: NDArray[np.bool_] = (self.low[choice] <= price) & (price < self.high[choice])
        return chosen


def _falling(
    prices: NDArray[np.float64], distortion: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Minus the prices, from the highest, and what the blocks of the first 0, 1, 2, ... of them lose together."""
    order = np.argsort(-prices, kind="stable")
    return -prices[order], np.concatenate([[0.0], np.cumsum(distortion[order])])


def _bands(
    table: DistortionTable, counts: Sequence[int], widths: Sequence[int], has_last: Callable[[int], bool]
) -> tuple[Band, ...]:
    """The bands that blocks make, by falling width; the last block may be a part of one.

    Args:
        table: of the projection.
        counts: blocks of each width.
        widths: by rising width, the first for what is left out.
        has_last: whether the last block has a width, by its index.
    """
    missing = table.distortion.shape[1] * table.step - len(table.order)
    bands = []
    for choice in range(len(widths) - 1, 0, -1):
        rank = counts[choice] * table.step - (missing if missing and has_last(choice) else 0)
        if rank > 0:
            bands.append(Band(widths[choice], rank))
    return tuple(bands)


def _bytes(shape: tuple[int, int], width: int, group_size: int) -> float:
    """Of one singular vector: codes, grids and sigma; padding is counted when the bands are known."""
    groups = sum(-(-length // group_size) for length in shape)
    return sum(-(-width * length // 8) for length in shape) + 4 * groups + 4


def _rounding_energy(
    rows: torch.Tensor, moment: torch.Tensor, width: int, group_size: int, fit: GridFit
) -> torch.Tensor:
    """`_energy` of what rounding does to every row."""
    # All rows at once, 180 MB where 4096 are 11008 long: beside eigenproblems all that a GPU is asked for waits its
    # turn, so that a few large requests are served sooner than many that stay in its cache.
    _, _, rounded = nearest(rows, width, group_size, fit)
    return _energy(rows - rounded, moment)


def _energy(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """X M x^T of every row x, float64 [rows].

    On a GPU in bfloat16 with float32 sums: twenty times as fast, and a hundredth of an energy decides no bit width.
    """
    product = torch.mm(rows.bfloat16(), moment, out_dtype=torch.float32) if rows.is_cuda else rows @ moment
    return (product * rows).sum(1).double().clamp_min(0)


def _blocks(distortion: torch.Tensor, step: int) -> torch.Tensor:
    """Sums of `step` neighbours."""
    return distortion.unflatten(1, (-1, step)).sum(2) if distortion.shape[1] % step == 0 else distortion.sum(1, True)
