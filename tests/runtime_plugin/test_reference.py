# SPDX-License-Identifier: Apache-2.0
"""The reference op against float64 mathematics on an independent unpacking of the same bytes."""

import numpy as np
import pytest
import torch
from deltaweave.formats import Band, DenseRecord, FactoredRecord, PackedBand, PackedMatrix, pack_codes, shard
from deltaweave.runtime_plugin.pytorch import DenseDelta, FactoredDelta, delta_linear, dense_linear
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-12


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
