# SPDX-License-Identifier: Apache-2.0
"""What is written is read back, in any shape; and stock safetensors reads the same bytes."""

import time

import numpy as np
import pytest
from deltaweave.formats import (
    Band,
    BaseRecord,
    Delta,
    DenseRecord,
    ExactArray,
    FactoredRecord,
    ReplaceRecord,
    RowsRecord,
    apply_record,
    dense_bytes,
    factored_bytes,
    load_records,
    pack_codes,
    record_bytes,
    row_bytes,
    save_records,
    shard,
    unpack_codes,
    write_delta,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import FILES, exact, make_factored, make_header, make_matrix, make_records

BITS = [1, 2, 3, 4, 8]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 9), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_codes_take_exactly_their_bits(bits, rows, length, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, length)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-bits * length // 8)) == (rows, row_bytes(bits, length))
    assert np.array_equal(unpack_codes(packed, bits, length), codes)
    # SPEC.md: bit k of a row is bit k % 8 of byte k // 8; code j holds bits [b j, b j + b), lowest first.
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    expected = (codes[:, :, None] >> np.arange(bits)) & 1
    assert np.array_equal(stream[:, : bits * length], expected.reshape(rows, -1))
    assert not stream[:, bits * length :].any()


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_do_not_fit_are_refused(bits):
    if bits < 8:
        with pytest.raises(ValueError, match=f"does not fit into {bits} bits"):
            pack_codes(np.full((1, 4), 1 << bits, np.uint8), bits)
    with pytest.raises(ValueError, match="5 bits, expected one of"):
        pack_codes(np.zeros((1, 4), np.uint8), 5)


@st.composite
def bands(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    result = []
    for _ in range(draw(st.integers(1, 8))):
        bits, rank = draw(st.sampled_from([*BITS, 16])), draw(st.integers(1, 6))
        if bits == 16:
            result.append(Band(16, rank, "none"))
        elif draw(st.booleans()):
            result.append(Band(bits, rank))
        else:
            result.append(Band(bits, rank, "codebook", tuple(generator.standard_normal(1 << bits).tolist())))
    return result


def same(one, other):
    assert type(one) is type(other)
    assert tuple(one.shape) == tuple(other.shape)
    assert dict(one.quality) == dict(other.quality)
    if isinstance(one, (FactoredRecord, DenseRecord)):
        assert np.array_equal(one.dequantize(), other.dequantize())
    if isinstance(one, FactoredRecord):
        assert one.bands == other.bands
        for mine, theirs in zip(one.factors(), other.factors(), strict=True):
            assert np.array_equal(mine, theirs)
    if isinstance(one, (RowsRecord, ReplaceRecord)):
        assert one.values.dtype == other.values.dtype
        assert np.array_equal(one.values.data, other.values.data)
    if isinstance(one, RowsRecord):
        assert np.array_equal(one.indices, other.indices)


@settings(max_examples=80, deadline=None)
@given(
    bands(),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.sampled_from([1, 7, 16, 128, 576]),
    st.integers(0, 2**32 - 1),
)
def test_any_factored_record(tmp_path_factory, bands, shape, group_size, seed):
    record = make_factored(np.random.default_rng(seed), shape, bands, group_size)
    path = tmp_path_factory.mktemp("r") / "d.safetensors"
    write_delta(path, make_header(), {"a.weight": record})
    with Delta.open(path) as delta:
        same(delta.record("a.weight"), record)
        assert delta.verify() == []
        count = delta.byte_count()
        expected = factored_bytes(shape, bands, group_size)
        assert (count.projections, count.codes, count.grids) == (expected.total, expected.codes, expected.grids)
        assert expected == record_bytes(record)
        assert count.file == path.stat().st_size == count.header + count.projections


@settings(max_examples=60, deadline=None)
@given(bands(), st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 5, 16, 64]), st.data())
def test_shards_are_slices_wherever_they_cut(bands, out_features, in_features, group_size, data):
    record = make_factored(np.random.default_rng(0), (out_features, in_features), bands, group_size)
    axis = data.draw(st.sampled_from(["out", "in"]))
    extent = out_features if axis == "out" else in_features
    start = data.draw(st.integers(0, extent - 1))
    stop = data.draw(st.integers(start + 1, extent))
    part = shard(record, axis, start, stop)
    whole = {"out": record.u, "in": record.v}[axis].dequantize()
    cut = {"out": part.u, "in": part.v}[axis]
    assert np.array_equal(cut.dequantize(), whole[:, start:stop])
    assert 0 <= cut.group_offset < group_size
    again = shard(part, axis, 0, stop - start)
    assert np.array_equal({"out": again.u, "in": again.v}[axis].dequantize(), whole[:, start:stop])


def test_group_cut_by_four_ranks_of_llama():
    """11008 / 4 is 21.5 groups of 128: two of four shards begin inside a group and repeat its grid."""
    record = make_factored(np.random.default_rng(0), (16, 11008), [Band(2, 2)], 128)
    parts = [shard(record, "in", rank * 2752, (rank + 1) * 2752) for rank in range(4)]
    assert [part.v.group_offset for part in parts] == [0, 64, 0, 64]
    assert [part.v.bands[0].grid.shape[1] for part in parts] == [22] * 4
    assert np.array_equal(np.concatenate([part.v.dequantize() for part in parts], axis=1), record.v.dequantize())


@pytest.mark.parametrize("most", [None, 1500, 4000])
def test_every_kind_of_record(tmp_path, most):
    records = make_records()
    opened = write_delta(tmp_path / "d.safetensors", make_header(), records, files=FILES, max_shard_bytes=most)
    assert (opened.suffix == ".json") == (most is not None)
    with Delta.open(opened) as delta:
        assert delta.names == list(records)
        assert delta.verify() == []
        for name, record in records.items():
            same(delta.record(name), record)
        header = make_header()
        assert (delta.header.base, delta.header.tuned) == (header.base, header.tuned)
        assert delta.header.method == header.method
        assert {name: delta.file(name) for name in delta.header.files} == FILES


def test_spool_files(tmp_path):
    records = make_records()
    save_records(tmp_path / "part.safetensors", records, {"layer": 3})
    loaded, metadata = load_records(tmp_path / "part.safetensors")
    assert metadata == {"layer": 3}
    assert list(loaded) == list(records)
    for name, record in records.items():
        same(loaded[name], record)


def test_everything_is_aligned_and_stock_safetensors_reads_it(tmp_path):
    from safetensors.numpy import load_file

    path = write_delta(tmp_path / "d.safetensors", make_header(), {
        name: record for name, record in make_records().items() if name != "lm_head.weight"  # numpy has no bfloat16
    })  # fmt: skip
    tensors = load_file(path)
    with Delta.open(path) as delta:
        for name, entry in delta._shards[0].tensors.items():
            assert entry.start % 256 == 0
            assert (entry.stop - entry.start) % 256 == 0
            assert tensors[name].tobytes() == bytes(delta._shards[0].raw(name))
    sigma = tensors["model.layers.0.self_attn.q_proj.weight.sigma"]
    assert sigma.dtype == np.float32
    assert not sigma[10:].any()


def test_stock_safetensors_reads_bfloat16_too(tmp_path):
    from safetensors import safe_open

    path = write_delta(tmp_path / "d.safetensors", make_header(), make_records())
    with safe_open(path, "pt") as file:
        values = file.get_tensor("lm_head.weight.values")
    expected = make_records()["lm_head.weight"].values.to_float32().reshape(-1)
    assert np.array_equal(values.float().numpy()[: expected.size], expected)


def test_two_writes_are_the_same_bytes(tmp_path):
    one = write_delta(tmp_path / "one.safetensors", make_header(), make_records(), files=FILES)
    two = write_delta(tmp_path / "two.safetensors", make_header(), make_records(), files=FILES)
    assert one.read_bytes() == two.read_bytes()


def test_affine_values_by_hand():
    codes = np.array([[0, 1, 2, 3, 1]], np.uint8)
    grid = np.array([[[0.5, 1.5], [2.0, 0.0]]], np.float16)
    from deltaweave.formats import PackedBand, PackedMatrix

    matrix = PackedMatrix((PackedBand(Band(2, 1), pack_codes(codes, 2), grid),), 5, 4)
    assert matrix.dequantize().tolist() == [[-0.75, -0.25, 0.25, 0.75, 2.0]]


@pytest.mark.parametrize("bits", BITS)
def test_dense_bytes_are_exact(bits):
    matrix = make_matrix(np.random.default_rng(0), [Band(bits, 30)], 50, None)
    assert dense_bytes((30, 50), bits, None) == record_bytes(DenseRecord((30, 50), matrix))


class TestApply:
    def test_delta_over_a_smaller_base_counts_missing_rows_as_zero(self):
        record = make_records()["model.embed_tokens.weight"]
        base = np.ones((7, 24), np.float32)
        tuned = apply_record(record, base)
        assert np.array_equal(tuned[:7], record.dequantize()[:7] + 1)
        assert np.array_equal(tuned[7:], record.dequantize()[7:])

    def test_delta_over_a_larger_base_drops_rows(self):
        record = make_records()["model.embed_tokens.weight"]
        assert apply_record(record, np.ones((11, 24), np.float32)).shape == (9, 24)

    def test_rows_replace(self):
        values = exact(np.random.default_rng(0), (2, 3), "F32")
        record = RowsRecord((5, 3), np.array([0, 4], np.int32), values)
        tuned = apply_record(record, np.zeros((4, 3), np.float32))
        assert np.array_equal(tuned[[0, 4]], values.data)
        assert not tuned[1:4].any()

    def test_base_policy_changes_nothing(self):
        base = np.arange(6, dtype=np.float32).reshape(2, 3)
        assert np.array_equal(apply_record(BaseRecord((2, 3)), base), base)

    def test_bfloat16_is_exact(self):
        patterns = np.array([0x3F80, 0xC000, 0x0001, 0x7F7F], np.uint16)
        values = ExactArray(patterns, "BF16").to_float32()
        assert values[:2].tolist() == [1.0, -2.0]
        assert np.array_equal((values.view(np.uint32) >> 16).astype(np.uint16), patterns)


def test_opening_a_7b_sized_header_is_quick(tmp_path):
    """224 projections of five tensors each, as a 7B delta has."""
    generator = np.random.default_rng(0)
    record = make_factored(generator, (64, 64), [Band(8, 2), Band(3, 8), Band(2, 20)], 128)
    records = {f"model.layers.{layer}.{kind}.weight": record for layer in range(32) for kind in "abcdefg"}
    path = write_delta(tmp_path / "d.safetensors", make_header(), records)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        Delta.open(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1
