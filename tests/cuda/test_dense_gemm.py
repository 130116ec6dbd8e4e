# SPDX-License-Identifier: Apache-2.0
"""lm_head rows of many tenants on the GPU against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltaweave.runtime_plugin.library import LibraryError
from dense_gemm_case import EMPTY, FACTORED, Head, Setup
from device_arena import Step
from gpu_checks import DTYPES, assert_close

pytestmark = pytest.mark.gpu

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
