# SPDX-License-Identifier: Apache-2.0
"""The custom ops on the CPU: against the reference op on the same records, opcheck, and arguments that they refuse."""

import numpy as np
import pytest
import torch
from deltaweave.formats import Band
from deltaweave.runtime_plugin.pytorch import (
    DenseDelta,
    FactoredDelta,
    OpError,
    delta_linear,
    delta_rows,
    dense_linear,
    ops,
)
from deltaweave.runtime_plugin.pytorch.ops_cuda import takes_base
from deltaweave.runtime_plugin.records import Rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_arena import (
    BIAS,
    EMBEDDING,
    HEAD,
    IN,
    LINEAR,
    NORM,
    OTHER,
    OUTS,
    SLOTS,
    SPARE,
    OpArena,
    random_band,
    random_dense,
    random_factored,
    slots_of,
)

pytestmark = pytest.mark.usefixtures("native")
band_lists = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, 40), st.booleans()), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    band_lists,
    st.sampled_from([128, 256]),
    st.integers(0, 2**31),
    st.lists(st.integers(-1, 4), max_size=9),
    st.booleans(),
)
def test_delta_gemm(bands, size, seed, slots, with_base):
    """Any bands; slots beyond the directory count as the base; what lies in the arena is what the file had.

    With the base's weights y may hold anything.
    """
    generator = np.random.default_rng(seed)
    arena = OpArena()
    shapes = [random_band(generator, *band) for band in bands]
    records = [
        {
            LINEAR: random_factored(generator, (OUTS[0], IN), shapes, size),
            OTHER: random_factored(generator, (OUTS[1], IN), shapes[:1]),
        },
        {OTHER: random_factored(generator, (OUTS[1], IN), shapes[::-1], size)},
    ]
    assert [arena.add(each) for each in records] == [0, 1]
    x = torch.from_numpy(generator.standard_normal((len(slots), IN))).float()
    before = [torch.from_numpy(generator.standard_normal((len(slots), out))).float() for out in OUTS]
    ys, base = [y.clone() for y in before], None
    if with_base:
        base = [torch.from_numpy(generator.standard_normal((out, IN))).float() for out in OUTS]
        before = [x @ weight.T for weight in base]
        ys = [y.fill_(torch.nan) for y in ys]
    if slots:
        plan = arena.plan(slots_of(slots))
        ops.delta_gemm(arena.buffer, arena.directory, plan, x, ys, [LINEAR, OTHER], 256, base=base)
    for token, slot in enumerate(slots):
        for parameter, y, old in zip((LINEAR, OTHER), ys, before, strict=True):
            record = records[slot].get(parameter) if 0 <= slot < len(records) else None
            term = delta_linear(x[token], FactoredDelta.of(record)) if record else 0
            assert torch.allclose(y[token], old[token] + term, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [None, 128])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rows_of_embedding_and_head(bits, size):
    generator = np.random.default_rng(bits)
    arena = OpArena()
    dense = random_dense(generator, (70, IN), bits, size)
    rows = Rows(np.array([0, 3, 69, 88], np.int32), generator.standard_normal((4, IN)).astype(np.float16))
    arena.add({EMBEDDING: dense, HEAD: dense})
    arena.add({EMBEDDING: rows, HEAD: rows})
    slots = slots_of([0, 1, -1, 1, 0, 2, 0, 1])
    table = torch.from_numpy(generator.standard_normal((60, IN))).float()
    ids = torch.tensor([5, 3, 3, 5, 65, 70, 89, 88])
    found = ops.embed(arena.buffer, arena.directory, slots, ids, table, EMBEDDING)
    delta, zero = DenseDelta.of(dense), torch.zeros(IN)
    base = torch.stack([table[i] if i < 60 else zero for i in ids.tolist()])
    expected = base.clone()
    expected[0] += delta_rows(ids[0], delta)
    expected[1] = torch.from_numpy(rows.values[1]).float()
    expected[4] += delta_rows(ids[4], delta)
    expected[7] = torch.from_numpy(rows.values[3]).float()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)

    x = torch.from_numpy(generator.standard_normal((8, IN))).float()
    before = torch.from_numpy(generator.standard_normal((8, SPARE))).float()
    y = before.clone()
    ops.delta_gemm(arena.buffer, arena.directory, arena.plan(slots), x, [y], [HEAD], 256)
    assert torch.equal(y, before), "rows are no factors"
    ops.dense_gemm(arena.buffer, arena.directory, arena.plan(slots), x, y, HEAD, 256)
    for token, slot in enumerate(slots.tolist()):
        expected = before[token].clone()
        if slot == 0:
            expected[:70] += dense_linear(x[token], delta)
        elif slot == 1:
            expected[torch.from_numpy(rows.indices).long()] = torch.from_numpy(rows.values).float() @ x[token]
        assert torch.allclose(y[token], expected, rtol=1e-4, atol=1e-4)


def test_no_rows_of_a_tenant():
    """Its only token lies beyond its vocabulary."""
    arena = OpArena()
    arena.add({EMBEDDING: random_dense(np.random.default_rng(0), (70, IN))})
    table = torch.randn(60, IN)
    found = ops.embed(arena.buffer, arena.directory, slots_of([0]), torch.tensor([80]), table, EMBEDDING)
    assert not found.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_round_as_hugging_face_s(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    arena = OpArena()
    values = torch.rand(IN)
    arena.add({NORM: values})
    x = torch.randn(4, 3, IN).to(dtype)
    weight = torch.rand(IN).to(dtype)
    got = ops.rms_norm(arena.buffer, arena.directory, slots_of([0, -1, 2, 0]), x, weight, 1e-5, NORM)
    norm = LlamaRMSNorm(IN, 1e-5).to(dtype)
    for token, own in enumerate((values.to(dtype), weight, weight, values.to(dtype))):
        norm.weight.data = own
        assert torch.equal(got[token], norm(x[token]))


def test_biases():
    arena = OpArena()
    values = torch.randn(OUTS[0])
    arena.add({BIAS: values})
    before = torch.randn(3, OUTS[0])
    y, plain = before.clone(), before.clone()
    base = torch.randn(OUTS[0])
    ops.add_bias(arena.buffer, arena.directory, slots_of([0, -1, 1]), [y, plain], [base, None], [BIAS, BIAS])
    assert torch.allclose(y, before + torch.stack([values, base, base]))
    assert torch.allclose(plain, before + torch.stack([values, torch.zeros(OUTS[0]), torch.zeros(OUTS[0])]))


def arguments():
    """Every op with arguments that it takes, by name."""
    generator = np.random.default_rng(0)
    arena = OpArena()
    bands = [Band(8, 2), Band(2, 20)]
    arena.add(
        {LINEAR: random_factored(generator, (OUTS[0], IN), bands), NORM: torch.rand(IN), BIAS: torch.rand(OUTS[0])}
    )
    slots = slots_of([0, -1, 0])
    plan, x, y = arena.plan(slots), torch.randn(3, IN), torch.randn(3, OUTS[0])
    held = {"arena": arena.buffer, "directory": arena.directory}
    return {
        "plan": {"slots": slots, "slot_count": SLOTS, "plan": plan},
        "delta_gemm": {**held, "plan": plan, "x": x, "ys": [y, y.clone()], "parameters": [LINEAR] * 2, "max_rank": 256},
        "dense_gemm": {**held, "plan": plan, "x": x, "y": torch.randn(3, SPARE), "parameter": HEAD, "max_rank": 256},
        "rms_norm": {**held, "slots": slots, "x": x, "weight": torch.rand(IN), "epsilon": 1e-5, "parameter": NORM},
        "add_bias": {**held, "slots": slots, "ys": [y], "biases": [torch.rand(OUTS[0])], "parameters": [BIAS]},
        "embed": {**held, "slots": slots, "ids": torch.arange(3), "table": torch.randn(9, IN), "parameter": EMBEDDING},
    }


@pytest.mark.parametrize("name", ["plan", "delta_gemm", "dense_gemm", "rms_norm", "add_bias", "embed"])
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name), (), arguments()[name])


def test_opcheck_with_the_base():
    base = [torch.randn(OUTS[0], IN)] * 2
    torch.library.opcheck(ops.delta_gemm, (), {**arguments()["delta_gemm"], "base": base})


def test_kernels_take_the_base_of_few_aligned_tokens():
    """By their contract, which is in bytes; where they do not, and on a CPU, torch computes it."""
    x, base = torch.zeros(8, IN).half(), [torch.zeros(out, IN).half() for out in OUTS]
    wide, parts = torch.zeros(8, 2 * IN).half(), torch.zeros(sum(OUTS), IN).half().split(OUTS)
    for taken in ((x, base), (x[:1], base), (wide[:, 8 : 8 + IN], base), (x, parts), (x, [b[5:] for b in base])):
        assert takes_base(*taken) and not ops.takes_base(*taken)
    more = torch.zeros(9, IN).half()
    odd, few = torch.zeros(OUTS[0], IN + 8).half(), torch.zeros(OUTS[0], IN + 4).half()
    for refused in (
        (more, base),
        (wide[:, 4 : 4 + IN], base),
        (few[:8, :IN], base),
        (x, [base[0], few[:, :IN]]),
        (x, [base[0], odd[:, 4 : 4 + IN]]),
        (x[:, : IN - 4].contiguous(), [base[0][:, : IN - 4]]),
    ):
        assert not takes_base(*refused)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plan", {"slots": torch.zeros(3)}, r"slots of torch.float32"),
        (
            "plan",
            {"slots": torch.zeros(6, dtype=torch.int32)[::2]},
            r"strides \[2\] .* expected contiguous torch.int32",
        ),
        ("plan", {"slots": torch.zeros(2049, dtype=torch.int32)}, "2049 tokens in one step"),
        ("delta_gemm", {"arena": torch.zeros(64)}, "arena of torch.float32"),
        ("delta_gemm", {"directory": torch.zeros(6, 3, 7, dtype=torch.int64)}, r"directory of shape \[6, 3, 7\]"),
        ("delta_gemm", {"plan": torch.zeros(9)}, "plan of torch.float32"),
        ("delta_gemm", {"x": torch.zeros(3, IN, dtype=torch.int64)}, "x of torch.int64"),
        ("delta_gemm", {"x": torch.zeros(IN, 3).T}, r"x of shape \[3, 200\] and strides \[1, 3\]"),
        ("delta_gemm", {"x": torch.zeros(2, IN)}, r"y of shape \[3, 136\] .* for an x of \[2, 200\]"),
        ("delta_gemm", {"ys": [torch.zeros(3, 8).half()] * 2}, "y of shape .* torch.float16 for an x"),
        ("delta_gemm", {"ys": [], "parameters": []}, "0 ys and 0 parameters, expected 1 to 4"),
        ("delta_gemm", {"parameters": [0]}, "2 ys and 1 parameters"),
        ("delta_gemm", {"parameters": [0, 7]}, "parameter 7, the directory has 7"),
        ("delta_gemm", {"base": [torch.zeros(OUTS[0], IN)]}, "1 weights of the base for 2 ys"),
        (
            "delta_gemm",
            {"base": [torch.zeros(OUTS[0], IN), torch.zeros(OUTS[1], IN)]},
            r"base of torch.float32, shape \[72, 200\] .* expected torch.float32 \[136, 200\] .* on cpu",
        ),
        (
            "delta_gemm",
            {"base": [torch.zeros(OUTS[0], IN).half()] * 2},
            "base of torch.float16, .* expected torch.float32",
        ),
        ("delta_gemm", {"base": [torch.zeros(IN, OUTS[0]).T] * 2}, r"strides \[1, 136\] .* with contiguous rows"),
        ("dense_gemm", {"parameter": -1}, "parameter -1, the directory has 7"),
        ("rms_norm", {"weight": torch.zeros(7)}, r"x of shape \[3, 200\] for 3 tokens and a norm of 7"),
        ("rms_norm", {"weight": torch.zeros(IN).half()}, "weight of torch.float16"),
        ("rms_norm", {"slots": torch.zeros(7, dtype=torch.int32)}, "for 7 tokens and a norm of 200"),
        ("add_bias", {"biases": [torch.zeros(5)]}, "bias of 5 features for a y of 136"),
        ("add_bias", {"biases": []}, "1 ys, 0 biases, 1 parameters"),
        ("embed", {"ids": torch.zeros(3, dtype=torch.int32)}, "ids of torch.int32"),
        ("embed", {"ids": torch.zeros(2, dtype=torch.int64)}, "2 ids and a table .* for 3 tokens"),
    ],
)
def test_refused_arguments(name, change, message):
    with pytest.raises(OpError, match=message):
        getattr(ops, name)(**{**arguments()[name], **change})
