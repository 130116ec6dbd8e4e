# SPDX-License-Identifier: Apache-2.0
"""Shards of every record: side by side or summed they are the whole, for 1, 2 and 4 ranks."""

import numpy as np
import pytest
from deltaweave.formats import Band
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.records import LoraStack, Mix, Rows, ServedRecord
from deltaweave.runtime_plugin.shards import Cut, RankLayout, shard_content, shard_records
from fusions import make_lora
from hypothesis import given
from hypothesis import strategies as st
from op_arena import random_dense, random_factored

LAYER = "model.layers.3."
BANDS = (Band(8, 2), Band(3, 5), Band(2, 4), Band(1, 3), Band(16, 2, "none"))
# Llama-2-7B cut in four has 2752 columns of down_proj a rank: groups of 128 are cut in the middle.
HEADS, HEAD_DIM, HIDDEN, MLP, VOCABULARY = 8, 24, 192, 344, 1000


def layouts(size, key_value_heads):
    return [RankLayout(rank, size, HEADS, key_value_heads, HEAD_DIM) for rank in range(size)]


def shapes(key_value_heads):
    wide, narrow = HEADS * HEAD_DIM, key_value_heads * HEAD_DIM
    return {
        "self_attn.q_proj": (wide, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, wide),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }


def product(content, x):
    if isinstance(content, LoraStack):
        sigmas = np.split(content.sigma, np.cumsum(content.ranks)[:-1])
        terms = zip(content.a, content.b, sigmas, strict=True)
        return sum((x @ a.astype(np.float64).T * sigma) @ b.astype(np.float64) for a, b, sigma in terms)
    return x @ content.dequantize().astype(np.float64).T


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("key_value_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("kind", ["factored", "lora"])
def test_projections(size, key_value_heads, kind):
    generator = np.random.default_rng(size)
    for module, shape in shapes(key_value_heads).items():
        if kind == "factored":
            content = random_factored(generator, shape, BANDS)
        else:
            pair = [make_lora(generator, rank, [module], shapes={module: shape}).modules[module] for rank in (3, 5)]
            content = LoraStack.of(shape, pair)
        x = generator.standard_normal((3, shape[1]))
        whole, name = product(content, x), f"{LAYER}{module}.weight"
        parts = {}
        for layout in layouts(size, key_value_heads):
            cut = layout.cut(name, shape)
            if cut is None:
                assert size == 1
                parts[0] = whole
            elif cut.axis == "out":
                parts[cut.start] = product(shard_content(content, cut), x)  # repeated heads are the same
            else:
                parts[cut.start] = product(shard_content(content, cut), x[:, cut.start : cut.stop])
        joined = sum(parts.values()) if module.endswith(("o_proj", "down_proj")) else np.hstack(list(parts.values()))
        assert np.allclose(joined, whole, rtol=1e-6, atol=1e-6 * np.abs(whole).max()), module


@pytest.mark.parametrize("size", [1, 2, 4])
def test_biases_and_norms(size):
    values = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    found = layouts(size, HEADS)
    cuts = [layout.cut(f"{LAYER}self_attn.q_proj.bias", values.shape) for layout in found]
    parts = [values if cut is None else shard_content(values, cut) for cut in cuts]
    assert np.array_equal(np.concatenate(parts), values)
    whole = ["self_attn.o_proj.bias", "input_layernorm.weight", "self_attn.q_norm.weight"]
    assert all(layout.cut(LAYER + name, (HIDDEN,)) is None for layout in found for name in whole)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_vocabularies(size, kind):
    """1000 rows are padded to 1024: the last rank has fewer."""
    generator = np.random.default_rng(0)
    indices = np.unique(generator.integers(0, VOCABULARY // 3, 40)).astype(np.int32)
    content = (
        random_dense(generator, (VOCABULARY, HIDDEN))
        if kind == "dense"
        else Rows(indices, generator.standard_normal((len(indices), HIDDEN)).astype(np.float16))
    )
    covered = 0
    for layout in layouts(size, 2):
        cut = layout.cut("model.embed_tokens.weight", (VOCABULARY, HIDDEN)) or Cut("out", 0, VOCABULARY)
        assert cut.start == covered
        covered, part = cut.stop, shard_content(content, cut)
        if kind == "dense":
            assert np.array_equal(part.dequantize(), content.dequantize()[cut.start : cut.stop])
            continue
        inside = (indices >= cut.start) & (indices < cut.stop)
        assert (part is None) == (not inside.any())
        if part is not None:
            assert np.array_equal(part.indices, indices[inside] - cut.start)
            assert np.array_equal(part.values, content.values[inside])
    assert covered == VOCABULARY


def test_a_shorter_vocabulary_leaves_the_last_ranks_nothing():
    content = random_dense(np.random.default_rng(0), (300, HIDDEN))
    assert shard_content(content, Cut("out", 512, 768)) is None
    assert shard_content(content, Cut("out", 256, 512)).shape == (44, HIDDEN)


def test_who_shares_what_is_gone_goes_too():
    rows = Rows(np.array([3], np.int32), np.zeros((1, 4), np.float16))
    records = [ServedRecord(0, rows), ServedRecord(1, None, shares=0), ServedRecord(2, np.ones(4, np.float32))]
    cut = {0: Cut("out", 8, 16), 1: Cut("out", 8, 16)}
    assert [record.parameter for record in shard_records(records, cut.get)] == [2]
    assert [record.parameter for record in shard_records(records, lambda _: None)] == [0, 1, 2]


@given(st.integers(0, 47), st.integers(1, 48), st.sampled_from(["out", "in"]))
def test_any_cut(start, extent, axis):
    stop = min(48, start + extent)
    content = random_factored(np.random.default_rng(3), (48, 48), BANDS)
    part = shard_content(content, Cut(axis, start, stop))
    span = slice(start, stop)
    whole = content.dequantize()
    assert np.allclose(part.dequantize(), whole[span] if axis == "out" else whole[:, span], rtol=1e-5, atol=1e-6)


def test_uneven_cuts_are_refused():
    with pytest.raises(AttachError, match="7 heads"):
        RankLayout(0, 2, 7, 7, 16)
    with pytest.raises(AttachError, match="rank 2"):
        RankLayout(2, 2, 8, 8, 16)
    with pytest.raises(AttachError, match="features cannot be cut"):
        RankLayout(0, 4, 8, 8, 16).cut(f"{LAYER}mlp.up_proj.weight", (342, 64))
    with pytest.raises(AttachError, match="whole on every rank"):
        shard_content(Mix(None, np.ones(2, np.float32)), Cut("out", 0, 1))
