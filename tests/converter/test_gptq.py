# SPDX-License-Identifier: Apache-2.0
"""GPTQ against its definition: the error it leaves, its optimality conditions, and the published group layout."""

import pytest
import torch
from deltaweave.converter import gptq as gptq_module
from deltaweave.converter.gptq import gptq, inverse_factor
from deltaweave.converter.quantize import VectorsAsColumns, VectorsAsRows, round_to_nearest


def correlated(samples, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    scale = torch.logspace(0, 1.5, features)
    return torch.randn(samples, features, generator=generator) @ mixing * scale


def energy(error, hessian):
    return float(((error @ hessian) * error).sum())


@pytest.fixture(params=[2, 3, 4])
def bits(request):
    return request.param


@pytest.fixture
def hessian():
    x = correlated(2000, 200)
    return 2 / len(x) * x.T @ x


@pytest.fixture
def vectors():
    return torch.linalg.qr(torch.randn(200, 24, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()


def test_inverse_factor(hessian):
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(200, dtype=torch.float64)
    factor = inverse_factor(hessian, torch.arange(200), 0.01).double()
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)
    assert torch.equal(factor, factor.triu())


def test_singular_hessian_is_damped_until_it_factors():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(inverse_factor(x.T @ x, torch.arange(64), 1e-9)).all()


@pytest.mark.parametrize("activation_order", [False, True])
def test_v_beats_round_to_nearest(vectors, hessian, bits, activation_order):
    widths = torch.full((24,), bits)
    nearest = round_to_nearest(vectors, widths, 64).values
    quantizer = VectorsAsRows(vectors, widths, 64)
    result = gptq(vectors, hessian, quantizer, activation_order=activation_order)
    assert torch.equal(result, quantizer.result.values)
    share = 0.8 if activation_order else 0.95
    assert energy(result - vectors, hessian) < share * energy(nearest - vectors, hessian)


def test_v_grids_are_fixed_beforehand(vectors, hessian):
    widths = torch.full((24,), 3)
    quantizer = VectorsAsRows(vectors, widths, 64)
    before = quantizer.result.grid.clone()
    gptq(vectors, hessian, quantizer)
    assert torch.equal(before, quantizer.result.grid)
    assert torch.equal(before, round_to_nearest(vectors, widths, 64).grid)


def test_u_beats_round_to_nearest(bits):
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(160, 24, generator=generator))[0]
    h = correlated(2000, 24, 5)
    hessian = h.T @ h / 2000
    widths = torch.full((24,), bits)
    nearest = round_to_nearest(u.T.contiguous(), widths, 64).values.T
    quantizer = VectorsAsColumns(160, widths, 64, u.device)
    result = gptq(u, hessian, quantizer)
    assert torch.equal(result, quantizer.result.values.T)
    assert energy(result - u, hessian) < energy(nearest - u, hessian)


def test_mixed_bits_in_one_pass(vectors, hessian):
    widths = torch.tensor([16] * 2 + [8] * 6 + [3] * 8 + [2] * 8)
    quantizer = VectorsAsRows(vectors, widths, 64)
    error = (gptq(vectors, hessian, quantizer) - vectors).square().sum(1)
    assert error[:2].max() < error[2:8].max() < error[8:16].max() < error[16:].max()
    assert int(quantizer.result.codes[8:16].max()) == 7
    assert int(quantizer.result.codes[16:].max()) == 3


def test_uncorrelated_inputs_reduce_to_round_to_nearest(vectors):
    widths = torch.full((24,), 3)
    result = gptq(vectors, torch.eye(200), VectorsAsRows(vectors, widths, 64))
    assert torch.equal(result, round_to_nearest(vectors, widths, 64).values)


def test_dead_columns_become_zero(vectors, hessian):
    hessian[:, 7] = hessian[7] = 0
    result = gptq(vectors, hessian, VectorsAsRows(vectors, torch.full((24,), 4), 64))
    assert torch.equal(result[:, 7], torch.zeros(24))


def test_stays_put_when_everything_is_representable(hessian):
    codes = torch.randint(0, 4, (8, 200), generator=torch.Generator().manual_seed(0)).float()
    codes[:, :64:2], codes[:, 1:64:2] = 0, 3  # every group spans the grid, so min-max finds it
    codes[:, 64:128:2], codes[:, 65:128:2], codes[:, 128::2], codes[:, 129::2] = 0, 3, 0, 3
    weight = 0.5 * (codes - 1)
    result = gptq(weight, hessian, VectorsAsRows(weight, torch.full((8,), 2), 64))
    assert torch.allclose(result, weight)


class RankAxisGroups:
    """The released code's layout: U [out_features, rank] grouped along the rank axis, bands never sharing a group."""

    def __init__(self, u, bands, group_size):
        self.grids, start = {}, 0
        for bits, rank in bands:
            for first in range(start, start + rank, group_size):
                columns = range(first, min(first + group_size, start + rank))
                piece = u[:, columns.start : columns.stop]
                low, high = piece.amin(1).clamp_max(0), piece.amax(1).clamp_min(0)
                scale = ((high - low) / (2**bits - 1)).half().float()
                self.grids |= dict.fromkeys(columns, (scale, (-low / scale).round(), 2**bits - 1))
            start += rank
        self.entries = 2 * u.shape[0] * len({id(grid) for grid in self.grids.values()})

    def quantize(self, column, values):
        scale, zero, most = self.grids[column]
        return scale * ((values / scale + zero).round().clamp(0, most) - zero)


def test_long_axis_groups_cost_less_than_the_released_rank_axis_groups_at_like_error():
    """Same codes; the released grouping of U spends 24 bits of grid on 16 bits of codes in its 8-bit band."""
    u = torch.linalg.qr(torch.randn(512, 100, generator=torch.Generator().manual_seed(0)))[0]
    sigma = 0.97 ** torch.arange(100)
    h = correlated(4000, 100, 2) * sigma
    hessian = h.T @ h / 4000
    bands = [(8, 2), (3, 18), (2, 80)]
    widths = torch.tensor([bits for bits, rank in bands for _ in range(rank)])

    ours = VectorsAsColumns(512, widths, 128, u.device)
    ours_error = energy(gptq(u, hessian, ours) - u, hessian)
    released = RankAxisGroups(u, bands, 128)
    released_error = energy(gptq(u, hessian, released) - u, hessian)

    assert ours.result.grid.numel() < 0.3 * released.entries
    assert ours_error < 1.5 * released_error


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# 16 bits and every width of codes, then many ranks of two bits.
ALL_WIDTHS = [16] * 2 + [8] * 3 + [4] * 4 + [3] * 8 + [1] * 3


def spread(visits, columns):
    """An upper factor of a plausible Hessian, and a permutation to visit in."""
    x = correlated(4 * columns, columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    return inverse_factor(x.T @ x / len(x), order, 0.01)[:visits, :visits].contiguous(), order[:visits]


def check_block(kernel, quantizers, block, factor, visits):
    """The kernel's codes, grids, values and errors are those of the CPU, which rounds every operation alike.

    Once in some 100,000 codes a tie is broken the other way, and what follows in its group then differs.
    """
    ours, theirs = block[:, visits].cuda(), block[:, visits]
    expected_errors = gptq_module.quantize_block(quantizers[1], visits, theirs, factor)
    errors = kernel(quantizers[0], visits.cuda(), ours, factor.cuda()).cpu()
    found, expected = quantizers[0].result, quantizers[1].result
    assert (found.codes.cpu() == expected.codes).float().mean() > 0.98
    assert (found.grid.cpu() == expected.grid).float().mean() > 0.98
    for got, want in ((ours.cpu(), theirs), (found.values.cpu(), expected.values), (errors, expected_errors)):
        assert ((got - want).abs() <= 1e-5 * want.abs().max()).float().mean() > 0.98


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group_size", [8, 64, 100, 128])
@pytest.mark.parametrize(("rank", "length", "width"), [(300, 512, 128), (77, 300, 128), (40, 90, 37), (1, 64, 1)])
def test_v_kernel_equals_the_columns_one_by_one(rank, length, width, group_size):
    from deltaweave.converter.gptq_triton import quantize_rows

    vectors = torch.linalg.qr(torch.randn(length, rank, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()
    bits = torch.tensor((ALL_WIDTHS + [2] * rank)[:rank])
    quantizers = [VectorsAsRows(vectors.to(device), bits, group_size) for device in ("cuda", "cpu")]
    check_block(quantize_rows, quantizers, vectors, *spread(width, length))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group_size", [8, 48, 128, 256])
@pytest.mark.parametrize(("length", "rank", "width"), [(512, 300, 128), (1000, 129, 100), (131, 40, 40), (64, 1, 1)])
def test_u_kernel_equals_the_columns_one_by_one(length, rank, width, group_size):
    from deltaweave.converter.gptq_triton import quantize_columns

    u = torch.linalg.qr(torch.randn(length, rank, generator=torch.Generator().manual_seed(1)))[0]
    bits = torch.tensor((ALL_WIDTHS + [2] * rank)[:rank])
    quantizers = [VectorsAsColumns(length, bits, group_size, torch.device(device)) for device in ("cuda", "cpu")]
    check_block(quantize_columns, quantizers, u, *spread(width, rank))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group_size", [128, 300])
def test_whole_gptq_leaves_the_same_error_on_both_devices(group_size):
    """A tie broken the other way changes its row from there on, so codes may differ; the error they leave may not."""
    u = torch.linalg.qr(torch.randn(1000, 300, generator=torch.Generator().manual_seed(1)))[0]
    x, h = correlated(4000, 1000), correlated(1200, 300) * 0.98 ** torch.arange(300)
    bits = torch.tensor((ALL_WIDTHS + [2] * 300)[:300])

    def left(weight, inputs, device, quantizer):
        hessian = inputs.T @ inputs / len(inputs)
        result = gptq(weight.to(device), hessian.to(device), quantizer).cpu()
        return energy((result - weight).double(), hessian.double())

    u_left, v_left = [], []
    for device in (torch.device("cpu"), torch.device("cuda")):
        u_left.append(left(u, h, device, VectorsAsColumns(1000, bits, group_size, device)))
        v_left.append(left(u.T.contiguous(), x, device, VectorsAsRows(u.T.to(device), bits, group_size)))
    assert u_left[1] == pytest.approx(u_left[0], rel=1e-2)
    assert v_left[1] == pytest.approx(v_left[0], rel=1e-2)
