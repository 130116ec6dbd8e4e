# SPDX-License-Identifier: Apache-2.0
"""The products' kernels emulated on the CPU against float64: what can be known of them where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from delta_gemm_case import PRESET, Case, Setup, check
from deltaweave.runtime_plugin.library import Library, Parameter, ParameterKind, Record
from deltaweave.runtime_plugin.pytorch import ops_cuda
from dense_gemm_case import Head
from dense_gemm_case import Setup as HeadSetup
from device_arena import DeviceArena, Step, placed, poisoned
from emulated_library import build_emulated, cuda_headers
from factored_records import RandomBand, RandomRecord
from gpu_checks import TOLERANCE

DENSE = 133  # tokens of a slot: a tile and a few. Slots of fewer than 128 are decode's
ALL_WIDTHS = ((16, 3), (8, 9), (4, 17), (3, 33), (2, 40), (1, 21), (16, 19), (2, 1))


@pytest.fixture(scope="module")
def emulated() -> Library:
    """Compiled here, in forty seconds of a CPU."""
    if not shutil.which("c++") or cuda_headers() is None:
        pytest.skip("needs a C++ compiler and CUDA's headers")
    return Library(build_emulated())


def one_tenant(**sizes: object) -> Case:
    """Tokens of one tenant alone."""
    return Case(**{"tokens": DENSE, "tenants": 1, "slots": [0] * DENSE, "chunk": 128, "in_features": 256} | sizes)


PREFILL = {
    "preset": one_tenant(),
    "preset bf16": one_tenant(dtype="bfloat16"),
    "two tenants and the base": Case(
        tokens=420, tenants=2, slots=[0, 1, 0, 1, -1, 1] * 70, chunk=128, in_features=256, outs=(300, 77)
    ),
    "two tiles of tokens an item": one_tenant(tokens=300, slots=[0] * 300, outs=(700,)),
    "odd sizes": one_tenant(in_features=331, outs=(77, 5), bands=(RandomBand(3, 5), RandomBand(2, 3))),
    "odd shard": one_tenant(in_features=300, outs=(100,), group_offsets=(37, 21)),
    "misaligned x": one_tenant(outs=(128,), x_gap=3),
    "input in parts": one_tenant(in_features=4096, outs=(128,), bands=(RandomBand(8, 2), RandomBand(2, 50))),
    "rank 500": one_tenant(outs=(256,), bands=(*PRESET[:2], RandomBand(2, 466))),
    "eight bands": one_tenant(bands=tuple(RandomBand(bits, rank) for bits, rank in ALL_WIDTHS)),
    "codebooks": one_tenant(bands=tuple(RandomBand(bits, 21, "codebook") for bits in (1, 2, 3, 4, 8))),
}


DECODE = (
    {
        "one token": Case(tokens=1, slots=[0]),
        "preset": Case(slots=[0, 1, -1, 2, 0]),
        "preset bf16": Case(slots=[0, 1, -1, 2, 0], dtype="bfloat16"),
        "two slices": Case(tokens=12, tenants=2, slots=[0, 1, 0, -1, 0, 1, 1, 0, 1, 0, 0, -1], outs=(300, 77)),
        "two chunks of a slot, two tiles of x": Case(tokens=11, slots=[0] * 11, in_features=2304, outs=(128,)),
        "teams of four": Case(
            tokens=26, tenants=2, slots=[0, 1, 1, 0, 1, -1, 1, 1, 1, 0, 1, 1, 1] * 2, outs=(256, 130)
        ),
        "teams of two": Case(tokens=66, tenants=3, slots=[0, 1, 1, 2, 1, -1] * 11, in_features=256, outs=(256,)),
        "teams of eight": Case(tokens=17, tenants=6, slots=[*range(6), *range(6), 4, 5, 5, -1, 5], outs=(384, 130)),
        "teams of four bf16": Case(tokens=24, slots=[0, 1, 2] * 8, in_features=256, dtype="bfloat16"),
        "odd sizes": Case(tokens=3, in_features=331, outs=(77, 5), bands=(RandomBand(3, 5), RandomBand(2, 3))),
        "odd sizes bf16": Case(tokens=3, in_features=331, outs=(77,), bands=(RandomBand(2, 3),), dtype="bfloat16"),
        "odd shard": Case(tokens=9, in_features=300, outs=(100,), group_offsets=(37, 21)),
        "misaligned x": Case(tokens=4, in_features=256, outs=(128,), x_gap=3),
        "eight bands": Case(in_features=1152, bands=tuple(RandomBand(bits, rank) for bits, rank in ALL_WIDTHS)),
        "codebooks": Case(bands=tuple(RandomBand(bits, 21, "codebook") for bits in (1, 2, 3, 4, 8))),
        "rank 500": Case(tokens=2, tenants=2, slots=[0, 1], outs=(256,), bands=(*PRESET[:2], RandomBand(2, 466))),
    }
    | {
        f"two bits, rank {rank}": Case(
            tokens=2, tenants=1, slots=[0, 0], in_features=1920, bands=(RandomBand(2, rank),)
        )
        for rank in (15, 17, 32, 47)
    }
    | {
        f"{tokens} tokens of {bits} bits": Case(
            tokens=tokens, tenants=1, slots=[0] * tokens, bands=(RandomBand(bits, 45),)
        )
        for tokens, bits in ((4, 1), (3, 2), (4, 3), (3, 4), (4, 8), (5, 2), (3, 16))
    }
)

HEADS = {
    "usual": (Head(tokens=14, features=1024, rows=75), "float16"),
    "odd sizes": (Head(tokens=14, features=331, rows=203), "bfloat16"),
    "odd shard": (Head(tokens=14, features=200, rows=64, in_offset=56), "float16"),
    "many tokens": (Head(tokens=44, features=256, rows=64, chunk=128), "float16"),
}


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_matches_float64(emulated, name):
    check(emulated, PREFILL[name], "cpu")


@pytest.mark.parametrize("name", DECODE)
def test_decode_matches_float64(emulated, name):
    check(emulated, DECODE[name], "cpu")


@pytest.mark.parametrize("rank", [1600, 4000])
def test_tokens_of_high_ranks_take_turns_in_little_shared_memory(emulated, rank):
    """Eight tokens' h of such ranks is more than a block of threads may hold on sm_89 and sm_120, 99 kB."""
    emulate_shared_bytes = ctypes.CDLL(str(build_emulated())).emulate_shared_bytes
    emulate_shared_bytes(99 << 10)
    try:
        bands = (*PRESET[:2], RandomBand(2, rank - 34))
        check(emulated, Case(tokens=8, tenants=1, slots=[0] * 8, in_features=128, outs=(128,), bands=bands), "cpu")
    finally:
        emulate_shared_bytes(0)


@pytest.mark.parametrize("name", HEADS)
def test_heads_match_float64(emulated, name):
    setup = HeadSetup(emulated, *HEADS[name], "cpu")
    setup.check(setup.run())


@pytest.mark.parametrize("tokens", [5, 26])
def test_bits_depend_on_slot_and_x_alone(emulated, tokens):
    """Tokens of slot 0 keep their bits in a second run, whose threads take other turns, beside other neighbours."""
    slots = torch.arange(tokens) % 3
    setup = Setup(emulated, Case(tokens=tokens, slots=slots.tolist(), in_features=256), "cpu")
    mine, first = slots == 0, setup.run()[0]
    assert torch.equal(first, setup.run()[0])
    others = torch.where(mine, 0, 2 * (slots - 1) - 1).int()  # the base, and slot 1 instead of 2
    assert torch.equal(first[mine], setup.run(slots=others)[0][mine])


@pytest.mark.parametrize("tokens", [3, 12])
def test_halves_give_the_same_bits(emulated, tokens):
    """Stage 1 without y, cut for a part of the GPU; then stage 2."""
    case = Case(tokens=tokens, slots=[0, 2, -1, 1] * 3, in_features=1152, outs=(300, 77))
    setup = Setup(emulated, replace(case, slots=case.slots[:tokens]), "cpu")
    step = Step(setup.arena, setup.slots)
    ys = [torch.zeros(tokens, out, dtype=setup.x.dtype) for out in case.outs]
    step.make_plan()
    gemm, workspace = step.product(setup.x, list(enumerate(ys)))
    for place in range(len(ys)):
        gemm.slices[place].y = None
    emulated.delta_shrink(gemm)
    for place, y in enumerate(ys):
        gemm.slices[place].y = y.data_ptr()
    emulated.delta_expand(gemm)
    assert workspace.numel() == gemm.workspace_bytes
    assert all(torch.equal(y, whole) for y, whole in zip(ys, setup.run(), strict=True))


BASES = {
    "one token": Case(tokens=1, slots=[0], outs=(128, 40, 17)),
    "the base alone": Case(tokens=2, slots=[-1, -1], outs=(77,)),
    "preset": Case(slots=[0, 1, -1, 2, 0], outs=(300, 77)),
    "eight tokens bf16": Case(tokens=8, slots=[0, 2, 1, 0, 1, -1, 1, 1], in_features=1152, dtype="bfloat16"),
    "ragged": Case(tokens=3, in_features=328, outs=(33, 5), bands=(RandomBand(3, 5), RandomBand(2, 3))),
    "odd shard": Case(tokens=3, in_features=304, outs=(100,), group_offsets=(37, 21)),
    # More than eight operands for each of the five multiprocessors there: most batches ahead.
    "many outputs": Case(tokens=2, slots=[0, 1], in_features=1064, outs=(400, 333)),
    "many outputs bf16": Case(tokens=8, slots=[0, 2, 1, 0, 1, -1, 1, 1], outs=(700,), dtype="bfloat16"),
}


@pytest.mark.parametrize("name", BASES)
def test_the_base_in_the_call(emulated, name):
    """Whatever y held, for tokens without a tenant and of a tenant without a record too; again with the same plan."""
    case = BASES[name]
    setup = Setup(emulated, case, "cpu")
    setup.arena.directory[0, 1:2] = 0
    delta = torch.cat(setup.run(), dim=1)
    step = Step(setup.arena, setup.slots)
    weight = placed(torch.randn(sum(case.outs), case.in_features).to(setup.x.dtype), "cpu")
    wide = placed(torch.full((case.tokens, sum(case.outs) + 3), torch.nan, dtype=setup.x.dtype), "cpu")
    step.make_plan()
    outputs = list(enumerate(wide[:, 3:].split(case.outs, dim=1)))
    gemm, workspace = step.product(setup.x, outputs, weight.split(case.outs))
    emulated.delta_gemm(gemm)
    first = wide[:, 3:].clone()
    emulated.delta_gemm(gemm)
    assert workspace.numel() == gemm.workspace_bytes
    assert torch.equal(first, wide[:, 3:]) and wide[:, :3].isnan().all()
    expected = setup.x.double() @ weight.double().T + delta.double()
    assert (first.double() - expected).norm() < TOLERANCE[case.dtype] * expected.norm()


@pytest.mark.parametrize("in_features", [296, 300], ids=["base in the call", "base by torch"])
def test_torch_ops_pass_their_arguments(emulated, monkeypatch, in_features):
    """The op of a GPU's host, without streams; with the base's weights, whose rows a kernel may not be able to read."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(ops_cuda, "native_library", lambda: emulated)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: poisoned(size, 0xFF, "cpu"))  # aligned as on a GPU
    case = Case(tokens=4, slots=[0, 2, -1, 1], in_features=in_features, outs=(100, 77), group_offsets=(37, 21))
    setup = Setup(emulated, case, "cpu")
    step, expected = Step(setup.arena, setup.slots), setup.run()
    step.make_plan()
    tensors = (setup.arena.buffer, setup.arena.directory, step.plan, setup.x)
    numbers = ([0, 1], setup.arena.max_rank, 37, [21, 21])
    ys = [torch.zeros(4, out, dtype=setup.x.dtype) for out in case.outs]
    ops_cuda.Kernels.delta_gemm(*tensors, ys, *numbers, None, None)
    assert all(torch.equal(y, right) for y, right in zip(ys, expected, strict=True))
    weight = placed(torch.randn(sum(case.outs), in_features).to(setup.x.dtype) / 100, "cpu")
    base, whole = weight.split(case.outs), torch.full((4, sum(case.outs)), torch.nan, dtype=setup.x.dtype)
    assert ops_cuda.takes_base(setup.x, base) == (in_features % 8 == 0)
    ops_cuda.Kernels.delta_gemm(*tensors, whole.split(case.outs, dim=1), *numbers, None, base)
    wanted = setup.x.double() @ weight.double().T + torch.cat(expected, dim=1).double()
    assert (whole.double() - wanted).norm() < TOLERANCE[case.dtype] * wanted.norm()


@pytest.mark.parametrize(("tokens", "in_features"), [(11, 1152), (DENSE, 256)], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_loras_match_float64(emulated, dtype, tokens, in_features):
    """Each band is an expert with a weight of its own for every token; the last token is the base's."""
    rng = np.random.default_rng(0)
    ranks, shape = (64, 9, 33), (130, in_features)
    drawn = RandomRecord.draw(rng, shape, tuple(RandomBand(16, rank) for rank in ranks))

    class Experts:
        def shape(self, parameter: int) -> Record:
            return Record.lora(parameter, ranks)

        def tensors(self) -> dict[str, bytes]:
            return drawn.tensors()

    parameters = [Parameter(ParameterKind.LINEAR, shape[1], shape[0], 0, 0)]
    arena = DeviceArena(emulated, parameters, slots=1, size=4 << 20, max_rank=sum(ranks), device="cpu")
    assert arena.add({0: Experts()}) == 0
    kind = getattr(torch, dtype)
    x = placed(torch.from_numpy(rng.standard_normal((tokens, shape[1]))).to(kind), "cpu")
    y = placed(torch.zeros((tokens, shape[0]), dtype=kind), "cpu")
    weights = placed(torch.from_numpy(rng.standard_normal((tokens, 8))).float(), "cpu")
    slots = torch.zeros(tokens)
    slots[-1] = -1
    step = Step(arena, slots, chunk=8 if tokens < DENSE else 128)
    step.make_plan()
    gemm, _workspace = step.product(x, [(0, y)])
    gemm.weights, gemm.weights_stride = weights.data_ptr(), weights.stride(0)
    emulated.gated_lora(gemm)

    of_ranks = np.repeat(weights.double().numpy()[:, : len(ranks)], ranks, axis=1)
    h = x.double().numpy() @ drawn.v.values.T * drawn.sigma * of_ranks
    expected = h @ drawn.u.values
    expected[-1] = 0
    assert np.linalg.norm(y.double().numpy() - expected) < TOLERANCE[dtype] * np.linalg.norm(expected)
