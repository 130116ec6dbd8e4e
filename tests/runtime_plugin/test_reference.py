# SPDX-License-Identifier: Apache-2.0
"""The reference op against float64 mathematics on an independent unpacking of the same bytes."""

import numpy as np
import pytest
import torch
from deltaweave.formats import Band, DenseRecord, FactoredRecord, PackedBand, PackedMatrix, pack_codes, shard
from deltaweave.runtime_plugin.pytorch import (
    DenseDelta,
    FactoredDelta,
    PackedRows,
    delta_linear,
    delta_rows,
    dense_linear,
    packed,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

BITS = [1, 2, 3, 4, 8, 16]


def groups_of(length, size, offset=0):
    return -(-(length + offset) // size)


def random_matrix(generator, bands, length, size):
    pieces = []
    for band in bands:
        if band.bits == 16:
            pieces.append(PackedBand(band, generator.standard_normal((band.rank, length)).astype(np.float16), None))
            continue
        codes = generator.integers(0, 1 << band.bits, (band.rank, length)).astype(np.uint8)
        groups = groups_of(length, size)
        shape = (band.rank, groups) if band.grid == "codebook" else (band.rank, groups, 2)
        grid = generator.uniform(0.01, 3, shape).astype(np.float16)
        pieces.append(PackedBand(band, pack_codes(codes, band.bits), grid))
    return PackedMatrix(tuple(pieces), length, size)


def exact(matrix):
    """float64 values, bit by bit from the definition in SPEC.md."""
    rows = []
    for piece in matrix.bands:
        for row in range(piece.band.rank):
            if piece.band.bits == 16:
                rows.append(piece.codes[row].astype(np.float64))
                continue
            stream = np.unpackbits(piece.codes[row], bitorder="little")
            values = []
            for column in range(matrix.length):
                bits = stream[column * piece.band.bits : (column + 1) * piece.band.bits]
                code = sum(int(bit) << place for place, bit in enumerate(bits))
                entry = piece.grid[row, (column + matrix.group_offset) // matrix.group_size].astype(np.float64)
                if piece.band.levels is not None:
                    values.append(entry * piece.band.levels[code])
                else:
                    values.append(entry[0] * (code - entry[1]))
            rows.append(np.array(values))
    return np.stack(rows)


@st.composite
def factored(draw):
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bands = []
    for _ in range(draw(st.integers(1, 4))):
        bits, rank = draw(st.sampled_from(BITS)), draw(st.integers(1, 5))
        if bits == 16:
            bands.append(Band(16, rank, "none"))
        elif draw(st.booleans()):
            bands.append(Band(bits, rank))
        else:
            bands.append(Band(bits, rank, "codebook", tuple(np.sort(generator.standard_normal(1 << bits)).tolist())))
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    size = draw(st.sampled_from([1, 3, 8, 16, 128]))
    u, v = (random_matrix(generator, bands, length, size) for length in shape)
    sigma = generator.uniform(0, 2, u.rows).astype(np.float32)
    return FactoredRecord(shape, u, v, sigma), generator


def product(record, x):
    return ((x @ exact(record.v).T) * record.sigma.astype(np.float64)) @ exact(record.u)


@settings(max_examples=80, deadline=None)
@given(factored(), st.integers(1, 5))
def test_factored(case, tokens):
    record, generator = case
    x = generator.standard_normal((tokens, record.shape[1]))
    expected = product(record, x)
    got = delta_linear(torch.from_numpy(x).float(), FactoredDelta.of(record)).double().numpy()
    # Terms may cancel, so float32 is held to the size of what is added up.
    terms = (np.abs(x) @ np.abs(exact(record.v)).T * record.sigma) @ np.abs(exact(record.u))
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(terms) + 1e-12


@settings(max_examples=60, deadline=None)
@given(factored(), st.data())
def test_shards_add_up_and_concatenate(case, data):
    record, generator = case
    x = torch.from_numpy(generator.standard_normal((3, record.shape[1]))).float()
    whole = delta_linear(x, FactoredDelta.of(record))
    row, column = (data.draw(st.integers(0, extent)) for extent in record.shape)
    parts = [shard(record, "out", *ends) for ends in ((0, row), (row, record.shape[0])) if ends[0] < ends[1]]
    joined = torch.cat([delta_linear(x, FactoredDelta.of(part)) for part in parts], dim=1)
    assert torch.allclose(joined, whole, rtol=1e-4, atol=1e-4)
    cuts = [ends for ends in ((0, column), (column, record.shape[1])) if ends[0] < ends[1]]
    added = sum(delta_linear(x[:, slice(*ends)], FactoredDelta.of(shard(record, "in", *ends))) for ends in cuts)
    scale = float(whole.abs().max()) + 1e-6
    assert float((added - whole).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_dense(bits, size):
    generator = np.random.default_rng(bits)
    codes = generator.integers(0, 1 << bits, (50, 37)).astype(np.uint8)
    shape = (2,) if size is None else (50, groups_of(37, size), 2)
    grid = generator.uniform(0.1, 1, shape).astype(np.float16)
    matrix = PackedMatrix((PackedBand(Band(bits, 50), pack_codes(codes, bits), grid),), 37, size)
    spread = grid.astype(np.float64) if size is None else np.repeat(grid.astype(np.float64), size, axis=1)[:, :37]
    x = generator.standard_normal((2, 3, 37))
    expected = x @ (spread[..., 0] * (codes - spread[..., 1])).T
    got = dense_linear(torch.from_numpy(x).float(), DenseDelta.of(DenseRecord((50, 37), matrix)))
    assert got.shape == (2, 3, 50)
    assert np.allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32_and_the_result_has_the_input_s_dtype(dtype):
    generator = np.random.default_rng(0)
    bands = [Band(8, 2), Band(3, 4), Band(2, 30)]
    u, v = (random_matrix(generator, bands, length, 32) for length in (48, 64))
    record = FactoredRecord((48, 64), u, v, np.full(36, 1e-4, np.float32))
    x = torch.from_numpy(generator.standard_normal((4, 64))).to(dtype)
    expected = product(record, x.double().numpy())
    got = delta_linear(x, FactoredDelta.of(record))
    assert got.dtype == dtype
    assert np.linalg.norm(got.double().numpy() - expected) <= torch.finfo(dtype).eps * np.linalg.norm(expected)


def test_wrong_width_is_named():
    record = FactoredRecord(
        (8, 16), *(random_matrix(np.random.default_rng(0), [Band(2, 3)], n, 8) for n in (8, 16)), np.ones(3, np.float32)
    )
    with pytest.raises(ValueError, match=r"input of shape \[2, 15\], the delta has 16 in_features"):
        delta_linear(torch.zeros(2, 15), FactoredDelta.of(record))


@settings(max_examples=80, deadline=None)
@given(factored(), st.integers(0, 2**31))
def test_unpacked_values_are_those_of_the_format_bit_for_bit(case, seed):
    """Any rows of any band, shards that cut a group included."""
    record, _ = case
    start = seed % record.shape[1]
    for whole in (record.v, record.u, record.v.columns(start, record.shape[1])):
        matrix, expected = PackedRows.of(whole), torch.from_numpy(whole.dequantize())
        rows = torch.cat([matrix.unpack(band, slice(0, band.rows)) for band in matrix.bands])
        assert torch.equal(rows, expected)
        last = matrix.bands[-1]
        picked = torch.tensor([last.rows - 1, 0, last.rows // 2])
        assert torch.equal(matrix.unpack(last, picked), expected[-last.rows :][picked])


@settings(max_examples=40, deadline=None)
@given(factored())
def test_rows_of_a_factored_delta(case):
    record, generator = case
    ids = generator.integers(0, record.shape[0], (2, 3))
    expected = (exact(record.u).T[ids] * record.sigma.astype(np.float64)) @ exact(record.v)
    got = delta_rows(torch.from_numpy(ids), FactoredDelta.of(record)).double().numpy()
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-12


@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_of_a_dense_delta(group_size):
    generator = np.random.default_rng(1)
    codes = generator.integers(0, 2, (50, 37)).astype(np.uint8)
    grid = generator.uniform(0.1, 1, (2,) if group_size is None else (50, 3, 2)).astype(np.float16)
    matrix = PackedMatrix((PackedBand(Band(1, 50), pack_codes(codes, 1), grid),), 37, group_size)
    record = DenseRecord((50, 37), matrix)
    ids = torch.tensor([[49, 0], [7, 7]])
    assert torch.equal(delta_rows(ids, DenseDelta.of(record)), torch.from_numpy(record.dequantize())[ids])


class Largest(TorchDispatchMode):
    """Remembers the most values that any tensor made inside had."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_no_dense_weight_is_made():
    generator = np.random.default_rng(0)
    u, v = (random_matrix(generator, [Band(8, 2), Band(3, 32), Band(2, 600)], 3000, 128) for _ in range(2))
    factored_delta = FactoredDelta.of(FactoredRecord((3000, 3000), u, v, np.ones(634, np.float32)))
    dense_delta = DenseDelta.of(DenseRecord((3000, 3000), random_matrix(generator, [Band(1, 3000)], 3000, 128)))
    for op, delta in ((delta_linear, factored_delta), (dense_linear, dense_delta)):
        with Largest() as largest:
            op(torch.ones(2, 3000), delta)
        assert 0 < largest.values <= 1.1 * packed.BLOCK_VALUES < 3000 * 3000 / 4


def test_bytes_of_the_file_are_shared_not_copied():
    record = FactoredRecord(
        (8, 16), *(random_matrix(np.random.default_rng(0), [Band(2, 3)], n, 8) for n in (8, 16)), np.ones(3, np.float32)
    )
    for array in (record.v.bands[0].codes, record.v.bands[0].grid, record.sigma):
        array.flags.writeable = False  # as views of a mapped file are; warnings are errors here
    delta = FactoredDelta.of(record)
    for tensor, array in (
        (delta.v.bands[0].codes, record.v.bands[0].codes),
        (delta.v.bands[0].grid, record.v.bands[0].grid),
        (delta.sigma, record.sigma),
    ):
        assert tensor.data_ptr() == array.ctypes.data


def test_no_tokens_give_no_outputs():
    record = FactoredRecord(
        (8, 16), *(random_matrix(np.random.default_rng(0), [Band(2, 3)], n, 8) for n in (8, 16)), np.ones(3, np.float32)
    )
    assert delta_linear(torch.zeros(2, 0, 16), FactoredDelta.of(record)).shape == (2, 0, 8)
