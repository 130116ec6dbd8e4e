# SPDX-License-Identifier: Apache-2.0
"""Products of 11 bits: their accuracy against float64, values beyond float16, and a whole model in them."""

import pytest
import torch
from deltaweave.converter import Checkpoint
from deltaweave.converter.calibration import BlockStream
from deltaweave.converter.half_products import HalfProducts, halved, product
from helpers import FAMILIES, tiny_checkpoint
from torch.nn import functional

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
ROUNDING = 2.0**-11  # the largest relative error of 11 significant bits


def values(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_values_keep_eleven_bits_whatever_their_size(size, device):
    x = size * (0.1 + torch.rand(50, 30, generator=torch.Generator().manual_seed(0))).to(device)
    rounded, scale = halved(x)
    assert rounded.dtype == torch.float16
    assert ((rounded.double() * scale.double() - x.double()).abs() <= 1.001 * ROUNDING * x.double()).all()
    assert not halved(torch.zeros(3, 3, device=device))[0].any()


def test_ordinary_values_are_left_in_their_place():
    x = values(20, 20)
    rounded, scale = halved(x, least=1.0)
    assert scale == 1
    assert torch.equal(rounded, x.half())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest", [1.0, 3e5])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_a_linear_layer_against_float64(largest, stored, device):
    x, weight, bias = values(3, 20, 64, device=device), values(40, 64, seed=1, device=device), values(40, device=device)
    x[0, 0] *= largest
    weight = weight.to(stored)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    with HalfProducts():
        found = functional.linear(x, weight, bias)
        ranks = functional.linear(x[0], weight)
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert 1e-5 < relative(found, exact) < ROUNDING
    assert relative(ranks, exact[0] - bias) < ROUNDING


@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_exact_but_for_its_sums(device):
    left, right = values(30, 500, device=device).half(), values(500, 20, seed=1, device=device).half()
    assert relative(product(left, right), left.double() @ right.double()) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_attention_against_float64(device):
    q, k, v = (values(2, 4, 33, 16, seed=seed, device=device) for seed in range(3))
    exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with HalfProducts():
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert found.dtype == torch.float32
    assert relative(found, exact) < 4 * ROUNDING


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_strays_an_eighth_as_far_as_in_bfloat16(tmp_path, family, device):
    folder = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    checkpoint, hidden = Checkpoint.open(folder), values(3, 20, 64, device=device)
    outputs = {}
    for name, dtype, half in (
        ("exact", torch.float32, False),
        ("half", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        stream = BlockStream(checkpoint, 20, torch.device(device), dtype, half_products=half)
        block = stream.load(0)
        assert (block.mlp.up_proj.weight.dtype == torch.float16) == half
        outputs[name] = stream.forward(0, hidden.to(dtype)).double()
    assert 0 < relative(outputs["half"], outputs["exact"]) < relative(outputs["bfloat16"], outputs["exact"]) / 5
