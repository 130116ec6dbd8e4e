# SPDX-License-Identifier: Apache-2.0
"""Bits under one budget: tables against the formula they stand for, the choice against trying everything."""

import itertools
import math

import pytest
import torch
from deltaweave.converter import RecipeError, allocation
from deltaweave.converter.allocation import DistortionTable, allocate, distortion_table, trade_curve
from deltaweave.converter.quantize import round_to_nearest
from deltaweave.converter.svd import truncated_svd
from deltaweave.formats import Band, factored_bytes

WIDTHS = (2, 4)


def moment(size, seed):
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


def table_of(shape, seed, widths=WIDTHS, relief=1.0, power=1.0):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    factors = truncated_svd(delta, min(shape))
    return factors, distortion_table(
        factors, moment(shape[1], seed), moment(shape[0], seed + 1), widths, 16, "min-max", relief, power
    )


def test_table_is_the_fisher_weighted_error_of_each_vector():
    factors, table = table_of((24, 40), 3)
    h, g = moment(40, 3).double(), moment(24, 4).double()

    def cost(error):
        return float(torch.trace(g @ error.double() @ h @ error.double().T)) / 2

    for column, rank in enumerate(table.order.tolist()):
        u, sigma, v = factors.u[:, rank], factors.sigma[rank], factors.v[rank]
        assert table.distortion[0, column] == pytest.approx(cost(sigma * torch.outer(u, v)), rel=1e-4)
        for row, width in enumerate(WIDTHS, 1):
            bits = torch.tensor([width])
            dv = v - round_to_nearest(v[None], bits, 16).values[0]
            du = u - round_to_nearest(u[None], bits, 16).values[0]
            expected = cost(sigma * torch.outer(u, dv)) + cost(sigma * torch.outer(du, v))
            assert table.distortion[row, column] == pytest.approx(expected, rel=1e-3)
    assert (table.distortion[0].diff() <= 0).all()


def test_relief_scales_what_rounding_costs_and_not_what_is_left_out():
    _, whole = table_of((24, 40), 3)
    _, half = table_of((24, 40), 3, relief=0.5)
    torch.testing.assert_close(half.distortion[0], whole.distortion[0])
    torch.testing.assert_close(half.distortion[1:], whole.distortion[1:] / 2)


def test_power_sets_how_much_the_moments_count():
    factors, whole = table_of((24, 40), 3)
    _, none = table_of((24, 40), 3, power=0.0)
    _, half = table_of((24, 40), 3, power=0.5)
    assert none.order.tolist() == list(range(24))
    torch.testing.assert_close(none.distortion[0], factors.sigma.double().square() / 2)
    by_vector = [table.distortion[:, table.order.argsort()] for table in (none, half, whole)]
    torch.testing.assert_close(by_vector[1][0], (by_vector[0][0] * by_vector[2][0]).sqrt())
    for costs in by_vector:  # what a width loses of a vector does not depend on what the vector is worth
        torch.testing.assert_close(costs / costs[0], by_vector[2] / by_vector[2][0])


def small_tables():
    """Two projections of three vectors each, of very different worth."""
    order = torch.arange(3)
    first = torch.tensor([[9.0, 4.0, 1.0], [3.0, 1.5, 0.6], [0.3, 0.2, 0.1]]).double()
    return {
        "a": DistortionTable((16, 16), order, first, 1),
        "b": DistortionTable((16, 32), order, 0.2 * first, 1),
    }


def every_choice(tables):
    """(bytes, distortion) of all 3^6 choices."""
    for picks in itertools.product(range(3), repeat=6):
        total, distortion = 0, 0.0
        for (_, table), choices in zip(tables.items(), (picks[:3], picks[3:]), strict=True):
            bands = [Band(w, n) for i, w in enumerate(WIDTHS, 1) if (n := choices.count(i))]
            total += factored_bytes(table.shape, bands, 16).total if bands else 0
            distortion += sum(float(table.distortion[c, i]) for i, c in enumerate(choices))
        yield total, distortion


def test_no_other_choice_of_at_most_these_bytes_is_better():
    """Padding to 256 bytes apart, which prices do not see: here every matrix pads to the same, so none is lost."""
    tables = small_tables()
    for budget in range(1600, 8000, 400):
        found = allocate(tables, WIDTHS, 16, budget)
        assert found.total_bytes <= budget
        best = min(d for b, d in every_choice(tables) if b <= budget)
        hull = min(d for b, d in every_choice(tables) if b <= found.total_bytes)
        assert found.distortion <= 1.35 * hull + 1e-9
        assert found.distortion >= best - 1e-9


def test_the_worthier_projection_gets_more():
    found = allocate(small_tables(), WIDTHS, 16, 2000)
    spent = {name: sum(b.bits * b.rank for b in plan.bands) for name, plan in found.bands.items()}
    assert spent["a"] > spent["b"] == 0


def test_more_bytes_never_cost_quality():
    tables = {"p": table_of((48, 64), 1)[1], "q": table_of((64, 48), 2)[1]}
    losses = [allocate(tables, WIDTHS, 16, budget).distortion for budget in range(3000, 12000, 500)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_bands_hold_each_vector_once_and_widths_fall():
    _, table = table_of((48, 64), 1, widths=(2, 3, 4, 8))
    plan = allocate({"p": table}, (2, 3, 4, 8), 16, 6000).bands["p"]
    assert [band.bits for band in plan.bands] == sorted({band.bits for band in plan.bands}, reverse=True)
    assert plan.rank == len(plan.order) == len(set(plan.order))
    assert plan.triplets == max(plan.order) + 1


def test_wide_matrices_get_whole_blocks_of_the_kernels():
    shape = (1024, 1024)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors = truncated_svd(delta, 100)
    eye = torch.eye(1024)
    table = distortion_table(factors, eye, eye, WIDTHS, 128, "min-max", 1.0)
    assert table.step == 16
    assert table.distortion.shape == (3, 6)
    for band in allocate({"p": table}, WIDTHS, 128, 30_000).bands["p"].bands:
        assert band.rank % 16 == 0


def test_a_projection_that_did_not_change_costs_nothing():
    zero = truncated_svd(torch.zeros(16, 16), 16)
    table = distortion_table(zero, torch.eye(16), torch.eye(16), WIDTHS, 16, "min-max", 1.0)
    found = allocate({"same": table}, WIDTHS, 16, 100)
    assert found.bands["same"].bands == ()
    assert found.total_bytes == 0


def test_a_budget_too_small_for_anything_is_refused():
    with pytest.raises(RecipeError, match="100 bytes for all projections do not hold one singular vector"):
        allocate(small_tables(), WIDTHS, 16, 100)


def test_a_budget_larger_than_everything_takes_everything():
    found = allocate(small_tables(), WIDTHS, 16, math.inf)
    assert found.distortion == pytest.approx(1.2 * 0.6)


def awkward_tables(seed, widths):
    """Distortions that rise with the width here and there, equal ones, a table of one short block."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for name, shape, step, vectors in (("a", (48, 64), 1, 48), ("b", (1024, 2048), 16, 320), ("c", (32, 48), 16, 11)):
        blocks = -(-vectors // step)
        left_out = torch.rand(blocks, generator=generator).double() ** 3
        rows = [left_out, *(left_out * torch.rand(blocks, generator=generator).double() for _ in widths)]
        distortion = torch.stack(rows)
        distortion[:, ::5] = distortion[0, ::5]  # nothing gained at any width
        tables[name] = DistortionTable(shape, torch.randperm(vectors, generator=generator), distortion, step)
    return tables


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [(2, 3, 4, 8), (8, 1, 4), (3,)])
def test_every_price_buys_each_block_its_best_width(seed, widths):
    """Against the definition: the least of distortion plus price times bytes, block by block."""
    tables = awkward_tables(seed, widths)
    curve = trade_curve(tables, widths, 16)
    assert curve[0][0] == 0
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve))
    for budget in (20_000, 60_000, 200_000, math.inf):
        found = allocate(tables, widths, 16, budget)
        total = lost = 0
        for name, table in tables.items():
            plan = found.bands[name]
            bits = dict.fromkeys(range(len(table.order)), 0)
            ranks = iter(plan.order)
            for band in plan.bands:
                for _ in range(band.rank):
                    bits[next(ranks)] = band.bits
            assert next(ranks, None) is None
            for block in range(table.distortion.shape[1]):
                members = table.order[block * table.step : (block + 1) * table.step].tolist()
                (width,) = {bits[vector] for vector in members}
                lost += float(table.distortion[widths.index(width) + 1 if width else 0, block])
            total += factored_bytes(table.shape, plan.bands, 16).total if plan.bands else 0
        assert total == found.total_bytes <= budget
        assert lost == pytest.approx(found.distortion)
        assert lost <= min((d for b, d in curve if b <= budget), default=math.inf) + 1e-9
    everything = allocate(tables, widths, 16, math.inf)
    assert everything.distortion == pytest.approx(sum(float(t.distortion.amin(0).sum()) for t in tables.values()))


@pytest.mark.parametrize("seed", range(5))
def test_sorted_prices_give_what_trying_every_width_gives(seed):
    widths = (2, 3, 4, 8)
    tables = awkward_tables(seed, widths)
    market = allocation._Market(tables, widths, 16)
    for price in [0.0, *torch.logspace(-9, 1, 60).tolist()]:
        total = lost = 0
        for table in tables.values():
            costs = [0.0, *(table.step * allocation._bytes(table.shape, width, 16) for width in widths)]
            choices = (table.distortion + price * torch.tensor(costs).double()[:, None]).argmin(0)
            lost += float(table.distortion.gather(0, choices[None]).sum())
            bits = torch.tensor([0, *widths])[choices].repeat_interleave(table.step)[: len(table.order)]
            bands = [Band(width, rank) for width in (8, 4, 3, 2) if (rank := int((bits == width).sum()))]
            total += factored_bytes(table.shape, bands, 16).total if bands else 0
        found = market.at(price)
        assert found.total_bytes == total
        assert found.distortion == pytest.approx(lost)
