# SPDX-License-Identifier: Apache-2.0
"""delta_gemm on the GPU against float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from delta_gemm_case import PRESET, Case, Setup, check
from deltaweave.runtime_plugin.library import LibraryError
from factored_records import RandomBand, RandomRecord
from gpu_checks import TOLERANCE

pytestmark = pytest.mark.gpu

DENSE = 128  # tokens of a slot from which prefill gives it tiles of its own

CASES = {
    "preset": Case(),
    "one token": Case(tokens=1, tenants=1, slots=[0]),
    "base alone": Case(tokens=3, slots=[-1, -1, -1]),
    "fused": Case(tokens=9, outs=(512, 128, 128), in_features=1024),
    "long input": Case(tokens=2, in_features=11008, outs=(256,), bands=(RandomBand(8, 2), RandomBand(2, 50))),
    "widest input": Case(tokens=2, in_features=32768, outs=(128,), bands=(RandomBand(2, 20),)),
    "many outputs": Case(tokens=2, in_features=256, outs=(32000,), bands=(RandomBand(3, 24),)),
    "rank 4096": Case(tokens=2, tenants=1, in_features=512, outs=(256,), bands=(RandomBand(2, 4096),)),
    "no multiples": Case(tokens=6, in_features=576, outs=(192,), bands=(RandomBand(4, 7), RandomBand(1, 13))),
    "odd sizes": Case(tokens=6, in_features=331, outs=(77, 5), bands=(RandomBand(3, 5), RandomBand(2, 3))),
    "shard": Case(tokens=4, in_features=2752, outs=(192,), group_offsets=(64, 64)),
    "odd shard": Case(tokens=4, in_features=300, outs=(100,), group_offsets=(37, 21)),
    "wide groups": Case(tokens=4, in_features=700, outs=(500,), group_sizes=(256, 384), group_offsets=(192, 128)),
    "one group": Case(tokens=4, group_sizes=(None, None)),
    "many tokens of one": Case(tokens=40, tenants=1, slots=[0] * 40),
    "prefill": Case(tokens=300, tenants=3),
    "prefill odd": Case(tokens=257, in_features=331, outs=(77,), tenants=2),
    "prefill of several tiles": Case(tokens=700, tenants=2, in_features=1280, outs=(512, 384), bands=PRESET),
    "strided x": Case(tokens=4, x_gap=8),
    "misaligned x": Case(tokens=4, x_gap=3),
    "eight bands": Case(
        bands=(
            RandomBand(16, 3),
            RandomBand(8, 9),
            RandomBand(4, 17),
            RandomBand(3, 33),
            RandomBand(2, 40),
            RandomBand(1, 21),
            RandomBand(16, 19),
            RandomBand(2, 1),
        )
    ),
} | {f"{bits} bits": Case(bands=(RandomBand(bits, 37),), tokens=7) for bits in (1, 2, 3, 4, 8, 16)}
CASES |= {f"{bits} bits codebook": Case(bands=(RandomBand(bits, 21, "codebook"),)) for bits in (1, 2, 3, 4, 8)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_decode_matches_float64(gpu_library, name, dtype):
    check(gpu_library, replace(CASES[name], dtype=dtype, chunk=8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_prefill_matches_float64(gpu_library, name, dtype):
    """Slot 0 has so many tokens that it gets tiles of its own; the others keep their few."""
    case = CASES[name]
    few = np.random.default_rng(1).integers(-1, case.tenants, case.tokens) if case.slots is None else case.slots
    slots = np.random.default_rng(2).permutation([0] * (DENSE + 5) + list(few)).tolist()
    check(gpu_library, replace(case, dtype=dtype, chunk=128, tokens=len(slots), slots=slots))


@pytest.mark.parametrize("tokens", [DENSE - 1, DENSE, DENSE + 1, 2 * DENSE, 2 * DENSE + 1])
def test_around_the_least_dense_slot(gpu_library, tokens):
    slots = [1] * tokens + [0] * 20 + [2] * (DENSE + 9) + [-1]
    check(gpu_library, Case(tokens=len(slots), slots=slots, chunk=128, outs=(300, 77)))


@pytest.mark.parametrize("outs", [(300, 77), (7000, 77)], ids=["few tiles", "tiles for a whole GPU"])
@pytest.mark.parametrize("tokens", [2 * DENSE + 44, 5 * DENSE])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_dense_slot(gpu_library, tokens, dtype, outs):
    """An odd number of tiles of one slot, beside two few-token ones."""
    slots = [1] * tokens + [0, 0, 2]
    check(gpu_library, Case(tokens=len(slots), slots=slots, chunk=128, outs=outs, dtype=dtype))


def test_most_tokens(gpu_library):
    """2048 tokens of dense and other slots, two tiles of tokens an item on some GPUs."""
    slots = np.repeat([0, 1, 2, 3, -1], [900, 128, 127, 600, 293])
    slots = np.random.default_rng(3).permutation(slots).tolist()
    bands = (RandomBand(8, 2), RandomBand(3, 32), RandomBand(2, 420))
    check(gpu_library, Case(tokens=2048, tenants=4, slots=slots, in_features=1100, outs=(900, 640), bands=bands))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_match_float64(gpu_library, seed):
    """Tokens of all kinds; in prefill some seeds have dense slots."""
    rng = np.random.default_rng(1000 + seed)
    bands = tuple(
        RandomBand(int(rng.choice([1, 2, 3, 4, 8, 16])), int(rng.integers(1, 70))) for _ in range(rng.integers(1, 6))
    )
    case = Case(
        tokens=int(rng.choice([1, 2, 7, 8, 9, 33, 70, 300])),
        tenants=int(rng.integers(1, 6)),
        in_features=int(rng.integers(1, 1500)),
        outs=tuple(int(out) for out in rng.integers(1, 700, rng.integers(1, 4))),
        bands=bands,
        dtype=str(rng.choice(["float16", "bfloat16"])),
        chunk=int(rng.choice([0, 8, 128])),
        seed=seed,
    )
    check(gpu_library, case)


@pytest.mark.parametrize("many", [0, 2 * DENSE], ids=["decode", "dense"])
def test_runs_are_bit_identical(gpu_library, many):
    import torch

    setup = Setup(
        gpu_library, Case(tokens=20 + 2 * many, slots=[*range(4)] * 5 + [1, 3] * many, tenants=4, outs=(512, 256))
    )
    first, second = setup.run(), setup.run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(
    ("in_features", "outs"), [(1024, (512, 256)), (328, (33, 5, 700)), (4096, (11008,)), (4096, (11008, 11008))]
)
def test_the_base_in_the_call(gpu_library, in_features, outs, tokens, dtype):
    """In one call and in halves, in a graph too; three kernels at a time, so many times: the bits must repeat."""
    import torch
    from device_arena import Step

    case = Case(tokens=tokens, tenants=3, in_features=in_features, outs=outs, slots=[0, 2, -1, 1, 0] * 2, dtype=dtype)
    setup = Setup(gpu_library, replace(case, slots=case.slots[:tokens]))
    setup.arena.directory[0, 2] = 0  # a tenant without a record
    weight = torch.randn(sum(outs), in_features, device="cuda", dtype=setup.x.dtype)
    delta = torch.cat(setup.run(), dim=1).double()
    expected = setup.x.double() @ weight.double().T + delta
    step, y = Step(setup.arena, setup.slots), torch.empty_like(expected, dtype=setup.x.dtype)
    outputs = list(enumerate(y.split(outs, dim=1)))
    gemm, workspace = step.product(setup.x, outputs, weight.split(outs))

    def work(*calls) -> None:
        step.make_plan()
        for call in calls:
            y.fill_(float("nan"))
            workspace.fill_(0xFF)
            for part in call:
                part(gemm, torch.cuda.current_stream().cuda_stream)

    whole, halves = [gpu_library.delta_gemm], [gpu_library.delta_shrink, gpu_library.delta_expand]
    work(whole)
    first = y.clone()
    assert float((first.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work(whole, halves, *[whole] * 5)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, first)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_products_that_read_each_other(gpu_library, tokens):
    """As a step's graph has them, under one plan: none may begin before the one in front of it is done."""
    import torch
    from device_arena import Step

    slots = [0, 2, -1, 1, 0, 0, 2, 1][:tokens]
    setup = Setup(gpu_library, Case(tokens=tokens, in_features=1024, outs=(1024,), slots=slots))
    weight = torch.randn(1024, 1024, device="cuda").to(setup.x.dtype) / 32
    step, xs = Step(setup.arena, setup.slots), [setup.x, *(torch.empty_like(setup.x) for _ in range(24))]
    calls = [step.product(x, [(0, y)], [weight]) for x, y in pairwise(xs)]

    def work() -> None:
        step.make_plan()
        for gemm, _workspace in calls:
            gpu_library.delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)

    work()
    seen = [x.clone() for x in xs]
    for x, y in pairwise(seen):
        setup.x.copy_(x)
        wanted = setup.x.double() @ weight.double().T + torch.from_numpy(setup.expected(0)).cuda()
        assert float((y.double() - wanted).norm() / wanted.norm()) < TOLERANCE["float16"]
    setup.x.copy_(seen[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(20):
        for x in xs[1:]:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(x, first) for x, first in zip(xs, seen, strict=True))


def test_a_tokens_base_does_not_depend_on_its_neighbours(gpu_library):
    import torch
    from device_arena import Step

    setup = Setup(gpu_library, Case(tokens=8, tenants=1, slots=[-1] * 8, in_features=1024, outs=(512,)))
    weight = torch.randn(512, 1024, device="cuda", dtype=setup.x.dtype)
    rows = []
    for x in (setup.x, *setup.x.split(1)):
        step, y = Step(setup.arena, setup.slots[: len(x)]), setup.x.new_empty(len(x), 512)
        step.make_plan()
        gemm, _workspace = step.product(x, [(0, y)], [weight])
        gpu_library.delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)
        rows.append(y)
    assert torch.equal(rows[0], torch.cat(rows[1:]))


def test_prefill_has_no_halves(gpu_library):
    from device_arena import Step

    setup = Setup(gpu_library, Case(tokens=300, chunk=128))
    step = Step(setup.arena, setup.slots, chunk=128)
    gemm, _ = step.product(setup.x, [(0, setup.x.new_zeros(300, 384))])
    for half in (gpu_library.delta_shrink, gpu_library.delta_expand):
        with pytest.raises(LibraryError, match="300 tokens with chunk_tokens 128 are prefill"):
            half(gemm)


@pytest.mark.parametrize("many", [0, DENSE], ids=["few", "dense"])
@pytest.mark.parametrize("chunk", [8, 128], ids=["decode", "prefill"])
def test_neighbours_leave_bits_alone(gpu_library, chunk, many):
    """Tokens of tenant 0 keep their bits when the others change tenant, and when a neighbour is swapped."""
    import torch

    slots = [0, 1, 0, 2, -1, 0, 1, 1, 2, 0, 0, -1] + [0, 2] * many
    setup = Setup(gpu_library, Case(tokens=len(slots), tenants=3, slots=slots, chunk=chunk))
    mine = torch.tensor(setup.slots.tolist()) == 0
    before = setup.run()[0][mine]
    others = torch.tensor([2, 2, -1, 1, 1, 0, -1, 2, 2, 1, 1, 1] + [1] * 2 * many)  # one becomes dense
    moved = torch.where(mine, 0, others).int()
    assert torch.equal(before, setup.run(slots=moved)[0][mine])
    setup.arena.evict(1)
    wide = Case(bands=(RandomBand(4, 120),), seed=9)
    record = RandomRecord.draw(np.random.default_rng(9), (384, 512), wide.bands)
    assert setup.arena.add({0: record}) == 1
    assert torch.equal(before, setup.run()[0][mine])
    assert torch.equal(before, setup.run(slots=moved)[0][mine])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("chunk", "many"), [(8, 0), (128, DENSE)], ids=["decode", "dense"])
def test_weights_scale_each_token(gpu_library, chunk, many, dtype):
    """Every stride, also one value for all; a weight of 0 leaves y's values alone."""
    import torch
    from device_arena import Step

    slots = [0, 1, -1, 1, 0] + [0] * many
    setup = Setup(gpu_library, Case(tokens=len(slots), slots=slots, chunk=chunk, dtype=dtype))
    table = torch.randn((len(slots), 8), device="cuda")
    table[1] = 0
    for weights in (table[:, 3], table[:1, 2].expand(len(slots))):
        y = torch.ones((len(slots), 384), device="cuda", dtype=setup.x.dtype)
        step = Step(setup.arena, setup.slots, chunk=chunk)
        step.make_plan()
        gemm, workspace = step.product(setup.x, [(0, y)])
        gemm.weights, gemm.weights_stride = weights.data_ptr(), weights.stride(0)
        gpu_library.delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        expected = 1 + setup.expected(0) * weights.double().cpu().numpy()[:, None]
        assert np.linalg.norm(y.double().cpu().numpy() - expected) < TOLERANCE[dtype] * np.linalg.norm(expected)
        assert (y[torch.tensor(setup.slots.tolist()) == -1] == 1).all()
        assert weights.stride(0) == 0 or (y[1] == 1).all()
        assert workspace.numel() == gemm.workspace_bytes


def test_adds_to_y(gpu_library):
    import torch
    from device_arena import Step

    setup = Setup(gpu_library, Case(tokens=4, slots=[0, -1, 2, 1]))
    y = torch.randn((4, 384), device="cuda").half()
    before = y.clone()
    Step(setup.arena, setup.slots).run(setup.x, [(0, y)])
    expected = before.double().cpu().numpy() + setup.expected(0)
    assert np.abs(y.double().cpu().numpy() - expected).max() < 4e-3
    assert torch.equal(y[1], before[1])


def test_slots_outside_the_directory_count_as_base(gpu_library):
    import torch
    from device_arena import Step

    setup = Setup(gpu_library, Case(tokens=5, slots=[0, 1, 2, 1, 0]))
    slots = torch.tensor([0, 99, -7, 1, 3], dtype=torch.int32)  # 3 is a slot without a tenant
    y = torch.zeros((5, 384), device="cuda").half()
    step = Step(setup.arena, slots)
    step.run(setup.x, [(0, y)])
    assert step.plan.view(torch.int32)[1].item() == 2
    assert y[0].any() and y[3].any()
    assert not y[1].any() and not y[2].any() and not y[4].any()


def test_graph_replay_follows_slots_and_tenants(gpu_library):
    """One captured graph serves other slots, other inputs and another tenant in a slot."""
    import torch
    from device_arena import Step

    setup = Setup(gpu_library, Case(tokens=4, slots=[0, 1, 2, -1]))
    y = torch.zeros((4, 384), device="cuda").half()
    step = Step(setup.arena, setup.slots)
    step.run(setup.x, [(0, y)])
    gemm, workspace = step.product(setup.x, [(0, y)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.make_plan()
        gpu_library.delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)
    step.slots.copy_(torch.tensor([2, 2, -1, 1]))
    record = RandomRecord.draw(np.random.default_rng(5), (384, 512), (RandomBand(3, 60),))
    setup.arena.evict(1)
    assert setup.arena.add({0: record}) == 1
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    setup.records[1] = {0: record}
    setup.slots = torch.tensor([2, 2, -1, 1])
    expected = setup.expected(0)
    got = y.double().cpu().numpy()
    assert np.linalg.norm(got - expected) < 2e-3 * np.linalg.norm(expected)
    assert workspace.numel() == gemm.workspace_bytes


@pytest.mark.parametrize(("chunk", "tokens"), [(8, 4), (128, DENSE + 4)], ids=["decode", "dense"])
def test_non_finite_tokens_stay_alone(gpu_library, chunk, tokens):
    import torch

    setup = Setup(gpu_library, Case(tokens=tokens, tenants=1, slots=[0] * tokens, chunk=chunk))
    clean = setup.run()[0]
    setup.x[2, 5] = float("nan")
    spoiled = setup.run()[0]
    others = torch.arange(tokens) != 2
    assert torch.isnan(spoiled[2]).all()
    assert torch.equal(clean[others], spoiled[others])


@pytest.mark.parametrize(("chunk", "tokens"), [(8, 3), (128, DENSE)], ids=["decode", "dense"])
def test_small_and_large_activations(gpu_library, chunk, tokens):
    """Scales at which fp16 intermediates would underflow or overflow."""
    setup = Setup(gpu_library, Case(tokens=tokens, tenants=1, slots=[0] * tokens, dtype="bfloat16", chunk=chunk))
    for factor in (2.0**-40, 2.0**30):
        setup.x.mul_(factor)
        expected, got = setup.expected(0), setup.run()[0].double().cpu().numpy()
        assert np.linalg.norm(got - expected) < 1e-2 * np.linalg.norm(expected)
        setup.x.div_(factor)


def test_short_workspace_is_refused(gpu_library):
    import torch
    from device_arena import Step

    setup = Setup(gpu_library, Case(tokens=2, slots=[0, 1]))
    y = torch.zeros((2, 384), device="cuda").half()
    step = Step(setup.arena, setup.slots)
    gemm, workspace = step.product(setup.x, [(0, y)])
    gemm.workspace_bytes = workspace.numel() - 256
    with pytest.raises(LibraryError, match=r"workspace of \d+ bytes, needed"):
        gpu_library.delta_gemm(gemm)
