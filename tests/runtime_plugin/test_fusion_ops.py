# SPDX-License-Identifier: Apache-2.0
"""The ops of a fusion on the CPU: gate and LoRAs against float64, weights of a delta, arguments that they refuse."""

import numpy as np
import pytest
import torch
from deltaweave.formats import Band, ExactArray, LoraMatrix
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.library import LibraryError
from deltaweave.runtime_plugin.pytorch import OpError, ops
from deltaweave.runtime_plugin.records import LoraStack, Mix
from fusion_records import as_float64, expected_term, expected_weights, random_loras, random_mix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_arena import GATE, IN, LINEAR, MAX_RANK, NORM, OTHER, OUTS, OpArena, random_factored, slots_of

pytestmark = pytest.mark.usefixtures("native")
rank_lists = st.lists(st.sampled_from([0, 1, 3, 7, 16, 24]), min_size=1, max_size=8).filter(any)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rank_lists, rank_lists, st.integers(0, 2**31), st.lists(st.integers(-1, 4), min_size=1, max_size=9))
def test_gate_and_loras(first, second, seed, slots):
    """Fusions of any ranks in one batch, one without a gate of its own, missing layers, slots beyond the directory."""
    generator = np.random.default_rng(seed)
    arena = OpArena()
    loras = [
        {LINEAR: random_loras(generator, (OUTS[0], IN), first), OTHER: random_loras(generator, (OUTS[1], IN), first)},
        {OTHER: random_loras(generator, (OUTS[1], IN), second)},
        {LINEAR: random_loras(generator, (OUTS[0], IN), [2])},
    ]
    mixes = [random_mix(generator, len(first), IN), random_mix(generator, len(second), IN, gated=False), None]
    for slot, (layers, mix) in enumerate(zip(loras, mixes, strict=True)):
        stacks = {parameter: LoraStack.of((OUTS[parameter], IN), experts) for parameter, experts in layers.items()}
        assert arena.add(stacks | ({GATE: mix} if mix else {})) == slot
    x = torch.from_numpy(generator.standard_normal((len(slots), IN))).float()
    block = torch.from_numpy(generator.standard_normal((len(slots), IN))).float()
    weights = torch.full((len(slots), 8), 7.0)
    ops.gate(arena.buffer, arena.directory, slots_of(slots), block, GATE, weights)
    for token, slot in enumerate(slots):
        mix = mixes[slot] if 0 <= slot < len(mixes) else None
        expected = expected_weights(block[token].numpy(), mix)
        assert np.allclose(weights[token].numpy(), expected, rtol=1e-5, atol=1e-6)
    before = [torch.from_numpy(generator.standard_normal((len(slots), out))).float() for out in OUTS]
    ys = [y.clone() for y in before]
    ops.gated_lora(
        arena.buffer, arena.directory, arena.plan(slots_of(slots)), x, ys, weights, [LINEAR, OTHER], MAX_RANK
    )
    for token, slot in enumerate(slots):
        for parameter, y, old in zip((LINEAR, OTHER), ys, before, strict=True):
            experts = loras[slot].get(parameter, []) if 0 <= slot < len(loras) else []
            term = expected_term(x[token].numpy(), weights[token].numpy(), experts)
            assert np.allclose(y[token].numpy(), old[token].numpy() + term, rtol=2e-3, atol=2e-3)


def test_weights_of_a_delta():
    """A delta as an expert: its term times a weight a token, from a column of the gate's."""
    generator = np.random.default_rng(1)
    arena = OpArena()
    record = random_factored(generator, (OUTS[0], IN), [Band(3, 9)])
    arena.add({LINEAR: record})
    slots = slots_of([0, -1, 0])
    x, plan = torch.from_numpy(generator.standard_normal((3, IN))), arena.plan(slots)
    weights = torch.from_numpy(generator.standard_normal((3, 8))).float()
    y = torch.zeros(3, OUTS[0], dtype=torch.float64)
    ops.delta_gemm(arena.buffer, arena.directory, plan, x, [y], [LINEAR], MAX_RANK, weights=weights[:, 5])
    expected = x.numpy() @ record.dequantize().T.astype(np.float64) * weights[:, 5, None].double().numpy()
    expected[1] = 0
    assert np.allclose(y.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_delta_and_a_fusion_do_not_disturb_each_other():
    """gated_lora leaves factored records alone, delta_gemm LoRAs."""
    generator = np.random.default_rng(2)
    arena = OpArena()
    arena.add({LINEAR: random_factored(generator, (OUTS[0], IN), [Band(3, 9)])})
    arena.add({LINEAR: LoraStack.of((OUTS[0], IN), random_loras(generator, (OUTS[0], IN), [4]))})
    x, y = torch.randn(2, IN), torch.zeros(2, OUTS[0])
    ops.delta_gemm(arena.buffer, arena.directory, arena.plan(slots_of([1, -1])), x, [y], [LINEAR], MAX_RANK)
    weights = torch.ones(2, 8)
    ops.gated_lora(arena.buffer, arena.directory, arena.plan(slots_of([0, -1])), x, [y], weights, [LINEAR], MAX_RANK)
    assert not y.any()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_small_values_keep_their_bits(dtype):
    """A LoRA whose B is far below float16's range; what is stored is exact for 16-bit files."""
    generator = np.random.default_rng(3)
    [matrix] = random_loras(generator, (24, 16), [3], dtype=dtype, size=2.0**-12)
    stack = LoraStack.of((24, 16), [matrix, None])
    assert stack.ranks == (3, 0)
    found = np.einsum("ro,r,ri->oi", stack.b[0].astype(np.float64), stack.sigma.astype(np.float64), stack.a[0])
    expected = matrix.scale * as_float64(matrix.b) @ as_float64(matrix.a)
    assert np.allclose(found, expected, rtol=1e-6 if dtype != "F32" else 4e-3, atol=1e-3 * np.abs(expected).max())
    if dtype == "BF16":
        assert np.allclose(found, expected, rtol=1e-6, atol=0)


def lora(shape=(24, 16), rank=2, value=1.0):
    a, b = np.full((rank, shape[1]), value, np.float32), np.ones((shape[0], rank), np.float32)
    return LoraMatrix(ExactArray(a, "F32"), ExactArray(b, "F32"), 1.0)


def test_stacks_that_are_refused():
    with pytest.raises(AttachError, match="fusion of 9 experts, a runtime serves 1 to 8"):
        LoraStack.of((24, 16), [lora()] * 9)
    with pytest.raises(AttachError, match="none of 2 experts has a LoRA"):
        LoraStack.of((24, 16), [None, None])
    with pytest.raises(AttachError, match=r"expert 1: a LoRA of shape \[24, 16\], the layer has \[24, 8\]"):
        LoraStack.of((24, 8), [lora((24, 8)), lora()])
    with pytest.raises(AttachError, match="not finite"):
        LoraStack.of((24, 16), [lora(value=np.inf)])
    with pytest.raises(AttachError, match="fusion of 9 experts"):
        Mix(None, np.ones(9, np.float32))
    with pytest.raises(AttachError, match=r"gate of shape \[2, 4\] with a bias of 3 experts"):
        Mix(np.ones((2, 4), np.float32), np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([library.Record.lora(NORM, [1])], "LoRAs of a vector"),
        ([library.Record.lora(GATE, [1])], "LoRAs of a gate"),
        ([library.Record.lora(LINEAR, [0, 0])], "experts of rank 0 together, the arena takes 1 to 256"),
        ([library.Record.lora(LINEAR, [200, 57])], "experts of rank 257 together"),
        ([library.Record.lora(LINEAR, [4, -1])], "expert 1: rank -1"),
        ([library.Record.mix(LINEAR, 2, True)], "a mix of a linear parameter, expected one of a gate"),
        ([library.Record.values(GATE)], "values of a gate"),
        ([library.Record.factored(GATE, [(2, 1, "affine")])], "a factored record of a gate"),
        ([library.Record.replaced_rows(GATE, 1)], "rows of a gate, expected a mix"),
    ],
)
def test_records_that_are_refused(records, message):
    with pytest.raises(LibraryError, match=message):
        OpArena().reserve(records)


def test_too_many_experts_in_a_record():
    for make in (lambda: library.Record.lora(0, [1] * 9), lambda: library.Record.mix(0, 9, False)):
        with pytest.raises(LibraryError, match="fusion of 9 experts, the kernels take 1 to 8"):
            make()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 8).half(), "weights of torch.float16"),
        (torch.ones(3, 8), r"expected float32 \[2, 8\]"),
        (torch.ones(2, 4), r"expected float32 \[2, 8\]"),
        (torch.ones(8, 2).T, "side by side"),
    ],
)
def test_weights_that_are_refused(weights, message):
    arena = OpArena()
    slots, x, y = slots_of([-1, -1]), torch.zeros(2, IN), torch.zeros(2, OUTS[0])
    with pytest.raises(OpError, match=message):
        ops.gate(arena.buffer, arena.directory, slots, x, GATE, weights)
    with pytest.raises(OpError, match=message):
        ops.gated_lora(arena.buffer, arena.directory, arena.plan(slots), x, [y], weights, [LINEAR], MAX_RANK)
    with pytest.raises(OpError, match=r"expected float32 \[2\]"):
        ops.delta_gemm(
            arena.buffer, arena.directory, arena.plan(slots), x, [y], [LINEAR], MAX_RANK, weights=torch.ones(3)
        )


def test_opcheck():
    generator = np.random.default_rng(4)
    arena = OpArena()
    stack = LoraStack.of((OUTS[0], IN), random_loras(generator, (OUTS[0], IN), [4, 0, 2]))
    arena.add({LINEAR: stack, GATE: random_mix(generator, 3, IN)})
    slots, x, y = slots_of([0, -1]), torch.randn(2, IN), torch.zeros(2, OUTS[0])
    weights, plan = torch.zeros(2, 8), arena.plan(slots_of([0, -1]))
    torch.library.opcheck(ops.gate, (arena.buffer, arena.directory, slots, x, GATE, weights))
    arguments = (arena.buffer, arena.directory, plan, x, [y], weights, [LINEAR], MAX_RANK)
    torch.library.opcheck(ops.gated_lora, arguments)
