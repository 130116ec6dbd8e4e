# SPDX-License-Identifier: Apache-2.0
"""delta_gemm on the GPU against float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from deltaweave.runtime_plugin.library import Library, LibraryError, Parameter, ParameterKind
from factored_records import RandomBand, RandomRecord

pytestmark = pytest.mark.gpu

PRESET = (RandomBand(8, 2), RandomBand(3, 32), RandomBand(2, 90))
TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}


@dataclass
class Case:
    """Sizes of one call; group offsets give tensor-parallel shards."""

    tokens: int = 5
    tenants: int = 3
    in_features: int = 512
    outs: tuple[int, ...] = (384,)
    bands: tuple[RandomBand, ...] = PRESET
    group_sizes: tuple[int | None, int | None] = (128, 128)
    group_offsets: tuple[int, int] = (0, 0)
    dtype: str = "float16"
    chunk: int = 0
    x_gap: int = 0  # elements between rows of x
    slots: list[int] | None = None
    seed: int = field(default=0)


class Setup:
    """Tenants of a case on the GPU, with x and what y must gain."""

    def __init__(self, library: Library, case: Case) -> None:
        import torch
        from device_arena import DeviceArena

        self.case = case
        rng = np.random.default_rng(case.seed)
        offsets = [offset % 128 for offset in case.group_offsets]
        parameters = [Parameter(ParameterKind.LINEAR, case.in_features, out, *offsets) for out in case.outs]
        rank = sum(band.rank for band in case.bands)
        self.arena = DeviceArena(library, parameters, slots=case.tenants + 1, size=64 << 20, max_rank=rank)
        self.records = [
            {
                index: RandomRecord.draw(rng, (out, case.in_features), case.bands, case.group_sizes, case.group_offsets)
                for index, out in enumerate(case.outs)
            }
            for _ in range(case.tenants)
        ]
        for slot, tenant in enumerate(self.records):
            assert self.arena.add(tenant) == slot
        drawn = rng.integers(-1, case.tenants, case.tokens) if case.slots is None else np.array(case.slots)
        self.slots = torch.from_numpy(drawn.astype(np.int32))
        wide = torch.from_numpy(rng.standard_normal((case.tokens, case.in_features + case.x_gap)))
        self.x = wide.to(getattr(torch, case.dtype)).cuda()[:, : case.in_features]

    def expected(self, index: int) -> np.ndarray:
        """The delta term in float64."""
        x = self.x.double().cpu().numpy()
        rows = [
            self.records[slot][index].apply(x[t : t + 1])[0] if slot >= 0 else np.zeros(self.case.outs[index])
            for t, slot in enumerate(self.slots.tolist())
        ]
        return np.stack(rows)

    def run(self, slots=None, chunk=None):
        """Y of zeros, inside a wider poisoned tensor whose margin must survive."""
        import torch
        from device_arena import Step

        outputs, wide = [], []
        for index, out in enumerate(self.case.outs):
            margin = torch.full((self.case.tokens, out + 24), 7.0, dtype=self.x.dtype, device="cuda")
            margin[:, 8 : 8 + out] = 0
            wide.append(margin)
            outputs.append((index, margin[:, 8 : 8 + out]))
        step = Step(
            self.arena,
            self.slots if slots is None else slots,
            chunk=self.case.chunk if chunk is None else chunk,
        )
        step.run(self.x, outputs)
        torch.cuda.synchronize()
        for margin, out in zip(wide, self.case.outs, strict=True):
            assert (margin[:, :8] == 7).all() and (margin[:, 8 + out :] == 7).all(), "wrote outside y"
        return [y.clone() for _, y in outputs]


def check(library: Library, case: Case) -> None:
    setup = Setup(library, case)
    for index, y in enumerate(setup.run()):
        expected = setup.expected(index)
        got = y.double().cpu().numpy()
        rms = np.sqrt(np.mean(expected**2)) + 1e-30
        worst = np.unravel_index(np.argmax(np.abs(got - expected)), got.shape)
        relative = np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-30)
        message = f"{case} slice {index}: worst at {worst}: {got[worst]} for {expected[worst]}, rms {rms}"
        assert relative < TOLERANCE[case.dtype], f"{message}, relative {relative}"
        assert np.abs(got - expected).max() < 8 * TOLERANCE[case.dtype] * rms, message


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


@pytest.mark.parametrize("chunk", [8, 128], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(gpu_library, name, dtype, chunk):
    case = CASES[name]
    check(gpu_library, Case(**{**vars(case), "dtype": dtype, "chunk": chunk}))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes_match_float64(gpu_library, seed):
    rng = np.random.default_rng(1000 + seed)
    bands = tuple(
        RandomBand(int(rng.choice([1, 2, 3, 4, 8, 16])), int(rng.integers(1, 70))) for _ in range(rng.integers(1, 6))
    )
    case = Case(
        tokens=int(rng.choice([1, 2, 7, 8, 9, 33, 70])),
        tenants=int(rng.integers(1, 6)),
        in_features=int(rng.integers(1, 1500)),
        outs=tuple(int(out) for out in rng.integers(1, 700, rng.integers(1, 4))),
        bands=bands,
        dtype=str(rng.choice(["float16", "bfloat16"])),
        chunk=int(rng.choice([0, 8, 128])),
        seed=seed,
    )
    check(gpu_library, case)


def test_runs_are_bit_identical(gpu_library):
    import torch

    setup = Setup(gpu_library, Case(tokens=20, tenants=4, outs=(512, 256)))
    first, second = setup.run(), setup.run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [8, 128], ids=["decode", "prefill"])
def test_neighbours_leave_bits_alone(gpu_library, chunk):
    """Tokens of tenant 0 keep their bits when the others change tenant, and when a neighbour is swapped."""
    import torch

    setup = Setup(gpu_library, Case(tokens=12, tenants=3, slots=[0, 1, 0, 2, -1, 0, 1, 1, 2, 0, 0, -1], chunk=chunk))
    mine = torch.tensor(setup.slots.tolist()) == 0
    before = setup.run()[0][mine]
    moved = torch.where(mine, 0, torch.tensor([2, 2, -1, 1, 1, 0, -1, 2, 2, 1, 1, 1])).int()
    assert torch.equal(before, setup.run(slots=moved)[0][mine])
    setup.arena.evict(1)
    wide = Case(bands=(RandomBand(4, 120),), seed=9)
    record = RandomRecord.draw(np.random.default_rng(9), (384, 512), wide.bands)
    assert setup.arena.add({0: record}) == 1
    assert torch.equal(before, setup.run()[0][mine])


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


def test_non_finite_tokens_stay_alone(gpu_library):
    import torch

    setup = Setup(gpu_library, Case(tokens=4, tenants=1, slots=[0, 0, 0, 0]))
    clean = setup.run()[0]
    setup.x[2, 5] = float("nan")
    spoiled = setup.run()[0]
    assert torch.isnan(spoiled[2]).all()
    assert torch.equal(clean[[0, 1, 3]], spoiled[[0, 1, 3]])


def test_small_and_large_activations(gpu_library):
    """Scales at which fp16 intermediates would underflow or overflow."""
    setup = Setup(gpu_library, Case(tokens=3, tenants=1, slots=[0, 0, 0], dtype="bfloat16"))
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
