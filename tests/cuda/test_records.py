# SPDX-License-Identifier: Apache-2.0
"""Records of every kind in the arena's directory: places, bytes, sharing, what is refused. Needs no GPU."""

from __future__ import annotations

import pytest
from deltaweave.runtime_plugin.library import (
    BAND_FIELDS,
    Arena,
    ArenaFullError,
    BandField,
    Field,
    LibraryError,
    Parameter,
    ParameterKind,
    Record,
    RecordKind,
)
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, FEATURES = 200, 256
BANDS = [(8, 2, "affine"), (2, 30, "affine")]
Q, EMBED, HEAD, NORM, BIAS = range(5)
MODEL = [
    Parameter(ParameterKind.LINEAR, FEATURES, 384, 0, 0),
    Parameter(ParameterKind.EMBEDDING, FEATURES, ROWS, 0, 0),
    Parameter(ParameterKind.LINEAR, FEATURES, ROWS, 0, 0),
    Parameter(ParameterKind.VECTOR, FEATURES, 1, 0, 0),
    Parameter(ParameterKind.VECTOR, 384, 1, 0, 0),
]
WHOLE = [
    Record.factored(Q, BANDS),
    Record.dense(EMBED, ROWS, 8, "affine"),
    Record.shared(HEAD, EMBED),
    Record.values(NORM),
    Record.values(BIAS),
]


@pytest.fixture
def arena(library):
    with Arena(library, device_address=0, size=1 << 20, slots=2, parameters=MODEL, max_rank=64) as made:
        yield made


def rows_of(arena, records):
    """The directory rows of a tenant that has just been committed."""
    slot = arena.reserve(records)
    arena.commit(slot)
    return slot, arena.directory_rows(slot)


def first_band(row):
    return dict(zip(BandField, row[Field.BANDS : Field.BANDS + BAND_FIELDS], strict=True))


def test_a_whole_fine_tune(arena):
    slot, rows = rows_of(arena, WHOLE)
    kinds = [RecordKind.FACTORED, RecordKind.DENSE, RecordKind.DENSE, RecordKind.VALUES, RecordKind.VALUES]
    assert [row[Field.KIND] for row in rows] == [kind + 1 for kind in kinds]
    for parameter, row in enumerate(rows):
        place = arena.payload(slot, parameter)
        assert row[Field.HEADER] == place.offset
        parts = [row[field] for field in (Field.SIGMA, Field.INDICES, Field.VALUES)]
        parts += [first_band(row)[part] for part in (BandField.V, BandField.U, BandField.LEVELS)]
        assert all(place.offset <= part < place.offset + place.bytes for part in parts if part)
        assert all(part % 256 == 0 for part in parts)
    arena.evict(slot)
    stats = arena.stats()
    assert stats.free_bytes == stats.largest_free_bytes == 1 << 20


def test_dense_rows(arena):
    _, rows = rows_of(arena, [Record.dense(EMBED, ROWS - 3, 3, "codebook", 256, 128)])
    row, band = rows[EMBED], first_band(rows[EMBED])
    assert row[Field.ROWS] == ROWS - 3 and row[Field.BAND_COUNT] == 1
    assert band[BandField.SHAPE] == 3 | 2 << 8 | (ROWS - 3) << 16
    assert row[Field.V_GROUP_SIZE : Field.U_GROUP_OFFSET + 1] == [256, 128, 0, 0]
    assert band[BandField.LEVELS] > band[BandField.V] == row[Field.HEADER] and not band[BandField.U]
    assert not row[Field.PADDED_RANK], "the products of factors look past it"


def test_replaced_rows(arena):
    slot, rows = rows_of(arena, [Record.replaced_rows(HEAD, 7)])
    row, band = rows[HEAD], first_band(rows[HEAD])
    assert row[Field.KIND] == RecordKind.ROWS + 1 and row[Field.ROWS] == 7
    assert band[BandField.SHAPE] == 16 | 7 << 16
    assert row[Field.INDICES] == arena.payload(slot, HEAD).offset
    assert band[BandField.V] == row[Field.INDICES] + 256
    assert arena.payload(slot, HEAD).bytes == 256 + 8 * FEATURES * 2, "an odd row is padded to two"


def test_values(arena):
    slot, rows = rows_of(arena, [Record.values(NORM)])
    assert rows[NORM][Field.VALUES] == arena.payload(slot, NORM).offset
    assert arena.payload(slot, NORM).bytes == 4 * FEATURES
    assert not any(rows[NORM][Field.BANDS :])


def test_shared_records_take_no_bytes(arena):
    own = [Record.dense(EMBED, ROWS, 8, "affine")]
    assert arena.tenant_bytes([*own, Record.shared(HEAD, EMBED)]) == arena.tenant_bytes(own)
    slot, rows = rows_of(arena, [Record.shared(HEAD, EMBED), *own])
    assert rows[HEAD] == rows[EMBED] and any(rows[EMBED])
    assert arena.payload(slot, HEAD) == arena.payload(slot, EMBED)
    arena.evict(slot)
    assert arena.stats().free_bytes == 1 << 20, "freed once"


def test_a_tenant_without_records(arena):
    slot, rows = rows_of(arena, [])
    assert arena.tenant_bytes([]) == 0
    assert not any(map(any, rows))
    assert arena.state(slot) == Arena.RESIDENT


def test_full_arena_takes_nothing(library):
    size = 1 << 15
    with Arena(library, device_address=0, size=size, slots=1, parameters=MODEL, max_rank=64) as tight:
        needed = tight.tenant_bytes(WHOLE)
        assert needed > size
        with pytest.raises(ArenaFullError, match=f"a tenant of {needed} bytes, {size} of {size} bytes free"):
            tight.reserve(WHOLE)
        assert tight.stats().free_bytes == size and tight.stats().free_slots == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record.factored(EMBED, BANDS), "parameter 1: a factored record of an embedding"),
        (Record.factored(NORM, BANDS), "parameter 3: a factored record of a vector"),
        (Record.values(Q), "parameter 0: values of a linear parameter"),
        (Record.replaced_rows(BIAS, 1), "parameter 4: rows of a vector, expected values"),
        (Record.dense(EMBED, ROWS + 1, 8, "affine"), "parameter 1: 201 rows, expected 1 to 200"),
        (Record.replaced_rows(EMBED, 0), "parameter 1: 0 rows"),
        (Record.dense(EMBED, 5, 16, "none"), "16 bits, expected 1 to 8 for dense rows"),
        (Record.dense(EMBED, 5, 5, "affine"), "5 bits, expected 1, 2, 3, 4, 8 or 16"),
        (Record.dense(EMBED, 5, 8, "affine", 64), "v_group_size 64, the kernels take multiples of 128"),
        (Record.dense(EMBED, 5, 8, "affine", 128, 32), "v_group_offset 32 does not belong to a shard"),
        (Record.shared(HEAD, EMBED), "parameter 2 shares the record of 1, which has none of its own"),
        (Record.shared(HEAD, HEAD), "parameter 2 shares the record of 2, which has none of its own"),
        (Record.shared(HEAD, 77), "parameter 2 shares the record of 77"),
        (Record.shared(HEAD, -2), "parameter 2 shares the record of -2"),
        (Record(parameter=Q, kind=9, shares=-1), "parameter 0: record kind 9, expected 0 to 5"),
    ],
)
def test_bad_records_are_refused(arena, record, message):
    with pytest.raises(LibraryError, match=message):
        arena.reserve([record])
    assert arena.stats().free_slots == 2 and arena.stats().free_bytes == 1 << 20


def altered(record, **change):
    """A copy with other fields."""
    copy = Record.from_buffer_copy(record)
    for name, value in change.items():
        setattr(copy, name, value)
    return copy


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (altered(Record.dense(EMBED, 5, 8, "affine"), band_count=2), "2 bands of rows, expected 1"),
        (altered(Record.dense(EMBED, 5, 8, "affine"), rows=6), "a band of rank 5 for 6 rows"),
        (altered(Record.dense(EMBED, 5, 8, "affine"), kind=RecordKind.ROWS), "8 bits, expected 16 for replaced rows"),
    ],
)
def test_rows_and_band_must_agree(arena, record, message):
    with pytest.raises(LibraryError, match=message):
        arena.reserve([record])


def test_sharing_is_checked(arena):
    chain = [Record.dense(EMBED, 5, 8, "affine"), Record.shared(HEAD, EMBED), Record.shared(Q, HEAD)]
    with pytest.raises(LibraryError, match="parameter 0 shares the record of 2, which has none of its own"):
        arena.reserve(chain)
    with pytest.raises(LibraryError, match=r"parameter 0 \[384, 256\] shares the record of 1 \[200, 256\]"):
        arena.reserve([chain[0], Record.shared(Q, EMBED)])
    with pytest.raises(LibraryError, match="parameter 1: a factored record of an embedding"):
        arena.reserve([Record.factored(HEAD, BANDS), Record.shared(EMBED, HEAD)])


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (Parameter(4, 8, 8, 0, 0), "kind 4, expected 0 to 3"),
        (Parameter(-1, 8, 8, 0, 0), "kind -1"),
        (Parameter(ParameterKind.VECTOR, 8, 2, 0, 0), "out_features 2, expected 1 to 1"),
        (Parameter(ParameterKind.VECTOR, 262145, 1, 0, 0), "in_features 262145, expected 1 to 262144"),
        (Parameter(ParameterKind.EMBEDDING, 32769, 8, 0, 0), "in_features 32769, expected 1 to 32768"),
    ],
)
def test_bad_parameters_are_refused(library, parameter, message):
    with pytest.raises(LibraryError, match=message):
        Arena(library, device_address=0, size=256, slots=1, parameters=[parameter], max_rank=1)


def file_bytes(bits, rows, features, group_size, group_offset, affine):
    """Codes, filled up to 16, and grid of one band in the file's order."""
    codes = rows * -(-bits * features // 8)
    groups = -(-(features + group_offset) // group_size) if group_size else 1
    entries = rows * groups if group_size else 1
    return -(-codes // 16) * 16 + (0 if bits == 16 else 2 * entries * (2 if affine else 1))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.integers(1, 100),
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(0, 3).map(lambda count: 128 * count),
    st.integers(0, 383),
    st.booleans(),
)
def test_file_order_fits_into_kernel_order(library, bits, rank, features, out, group_size, offset, affine):
    """What a host buffer keeps at a band's V and U never reaches the next part."""
    offset = offset % group_size if group_size else 0
    grid = "none" if bits == 16 else "affine" if affine else "codebook"
    parameter = Parameter(ParameterKind.LINEAR, features, out, offset % 128, offset % 128)
    record = Record.factored(0, [(bits, rank, grid)], (group_size,) * 2, (offset,) * 2)
    with Arena(library, device_address=0, size=1 << 23, slots=1, parameters=[parameter], max_rank=100) as arena:
        slot, rows = rows_of(arena, [record])
        band, end = first_band(rows[0]), arena.payload(slot, 0).offset + arena.payload(slot, 0).bytes
        v = file_bytes(bits, rank, features, group_size, offset, affine)
        u = file_bytes(bits, rank, out, group_size, offset, affine)
        assert band[BandField.V] + v <= band[BandField.U]
        assert band[BandField.U] + u <= (band[BandField.LEVELS] or end)
