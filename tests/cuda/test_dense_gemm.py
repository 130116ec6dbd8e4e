# SPDX-License-Identifier: Apache-2.0
"""lm_head rows of many tenants on the GPU against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from deltaweave.runtime_plugin.library import LibraryError, Parameter, ParameterKind
from device_arena import Step
from factored_records import RandomBand, RandomRecord
from gpu_checks import DTYPES, Poisoned, assert_close, make_arena
from table_records import RandomDense, draw_tables

pytestmark = pytest.mark.gpu

FACTORED, EMPTY = 10, 11  # slots, behind those of draw_tables


@dataclass
class Head:
    """Sizes of one case; slots are drawn if they are not given."""

    tokens: int = 24
    features: int = 512
    rows: int = 400
    in_offset: int = 0
    group_size: int | None = 128
    chunk: int = 0
    x_shift: int = 0
    slots: tuple[int, ...] | None = None


HEADS = {
    "usual": Head(),
    "one token": Head(tokens=1, slots=(0,)),
    "one tenant": Head(tokens=20, slots=(1,) * 20),
    "rows alone": Head(tokens=9, slots=(7,) * 4 + (8,) * 4 + (9,)),
    "odd": Head(features=331, rows=203),
    "shard": Head(features=200, rows=64, in_offset=56),
    "one group": Head(group_size=None),
    "wide input": Head(tokens=12, features=11008, rows=48),
    "many rows": Head(tokens=12, features=256, rows=40000),
    "prefill": Head(tokens=300, chunk=128),
    "default of many tokens": Head(tokens=270, rows=130),
    "misaligned": Head(x_shift=3),
    "none of its own": Head(tokens=5, slots=(-1, EMPTY, 99, -5, FACTORED)),
}


class Setup:
    """Tenants of a case, a factored and an empty one among them, and what y must become."""

    def __init__(self, library, case, dtype):
        self.library, self.case, self.dtype = library, case, dtype
        rng, kind = np.random.default_rng(case.tokens + case.features), getattr(torch, dtype)
        self.records = draw_tables(rng, case.features, case.rows, case.rows, case.group_size, case.in_offset)
        offset = case.in_offset if case.group_size else 0
        self.factored = RandomRecord.draw(
            rng, (case.rows, case.features), (RandomBand(4, 20),), (case.group_size, case.group_size), (offset, 0)
        )
        parameter = Parameter(ParameterKind.LINEAR, case.features, case.rows, case.in_offset, 0)
        tenants = [*({0: record} for record in self.records), {0: self.factored}]
        self.arena = make_arena(library, [parameter], tenants, size=256 << 20)
        drawn = rng.integers(-1, EMPTY + 1, case.tokens) if case.slots is None else np.array(case.slots)
        self.slots = torch.from_numpy(drawn.astype(np.int32))
        wide = torch.from_numpy(rng.standard_normal((case.tokens, case.features + 8))).to(kind).cuda()
        self.x = wide[:, case.x_shift : case.x_shift + case.features]
        self.before = torch.from_numpy(rng.standard_normal((case.tokens, case.rows)) * 0.1).to(kind).cuda()

    def run(self, slots=None, chunk=None, *, both=False):
        """What y holds afterwards, its margin checked."""
        y = Poisoned((self.case.tokens, self.case.rows), self.x.dtype)
        y.inner.copy_(self.before)
        chunk = self.case.chunk if chunk is None else chunk
        step = Step(self.arena, self.slots if slots is None else slots, chunk=chunk)
        step.make_plan()
        gemm, workspace = step.product(self.x, [(0, y.inner)])
        if both:
            self.library.delta_gemm(gemm)
        self.library.dense_gemm(gemm)
        got = y.numpy()
        assert workspace.numel() == gemm.workspace_bytes
        return got

    def expected(self, t, slot):
        """One token's y in float64."""
        y, x = self.before[t].double().cpu().numpy(), self.x[t].double().cpu().numpy()
        if not 0 <= slot < FACTORED:
            return y
        record = self.records[slot]
        if isinstance(record, RandomDense):
            y[: len(record.values)] += record.values @ x
        else:
            y[record.indices] = record.values.astype(np.float64) @ x
        return y

    def check(self, got):
        """Tokens with rows are close, all others untouched."""
        for t, slot in enumerate(self.slots.tolist()):
            note = f"{self.case} token {t} slot {slot}"
            if 0 <= slot < FACTORED:
                assert_close(got[t], self.expected(t, slot), self.dtype, note)
            else:
                assert np.array_equal(got[t], self.expected(t, slot)), note


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_dense_gemm(gpu_library, name, dtype):
    setup = Setup(gpu_library, HEADS[name], dtype)
    setup.check(setup.run())


@pytest.mark.parametrize("seed", range(12))
def test_random_heads_match_float64(gpu_library, seed):
    rng = np.random.default_rng(seed)
    case = Head(
        tokens=int(rng.choice([1, 2, 8, 9, 17, 40])),
        features=int(rng.integers(1, 1300)),
        rows=int(rng.integers(20, 900)),
        chunk=int(rng.choice([0, 8, 128])),
    )
    setup = Setup(gpu_library, case, str(rng.choice(DTYPES)))
    setup.check(setup.run())


def test_bits_depend_on_slot_and_x_alone(gpu_library):
    """Neighbours, chunks and repetition leave a token's bits alone."""
    setup = Setup(gpu_library, Head(), "float16")
    first = setup.run()
    assert np.array_equal(first, setup.run())
    assert np.array_equal(first, setup.run(chunk=128))
    mine = torch.arange(24) % 2 == 0
    moved = torch.where(mine, setup.slots, (setup.slots + 4) % EMPTY)
    assert np.array_equal(first[mine.numpy()], setup.run(slots=moved)[mine.numpy()])


def test_both_products_serve_one_head(gpu_library):
    """delta_gemm and dense_gemm on the same y, each with its own tenants."""
    setup = Setup(gpu_library, Head(tokens=14), "float16")
    slots = torch.tensor([FACTORED, 0, 7, 8, -1, 99, -5, 9, FACTORED, 3, 4, 5, EMPTY, 6], dtype=torch.int32)
    got = setup.run(slots, both=True)
    for t, slot in enumerate(slots.tolist()):
        expected = setup.expected(t, slot)
        if slot == FACTORED:
            expected += setup.factored.apply(setup.x[t : t + 1].double().cpu().numpy())[0]
        assert_close(got[t], expected, "float16", f"token {t} slot {slot}")


def test_two_slices_are_refused(gpu_library):
    setup = Setup(gpu_library, Head(tokens=2), "float16")
    step = Step(setup.arena, setup.slots)
    gemm, workspace = step.product(setup.x, [(0, setup.before), (0, setup.before)])
    with pytest.raises(LibraryError, match="slice_count of a dense product 2, expected 1 to 1"):
        gpu_library.dense_gemm(gemm)
    assert workspace.numel() == gemm.workspace_bytes
