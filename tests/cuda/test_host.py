# SPDX-License-Identifier: Apache-2.0
"""The library's host logic: slot life, bytes, directory rows, argument checks. Needs no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from deltaweave.runtime_plugin.library import (
    BAND_FIELDS,
    DIRECTORY_FIELDS,
    Arena,
    ArenaFullError,
    BandField,
    Batch,
    Bias,
    Embedding,
    Field,
    Gate,
    Gemm,
    Library,
    LibraryError,
    Norm,
    Parameter,
    ParameterKind,
    Record,
    RecordKind,
    RepackArgs,
    find_library,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LINEARS = [Parameter(ParameterKind.LINEAR, 256, 384, 0, 0), Parameter(ParameterKind.LINEAR, 384, 256, 0, 0)]
BANDS = [(8, 2, "affine"), (3, 32, "affine"), (2, 90, "affine")]
KEEP_SLOTS = 3


def tenant(bands=BANDS):
    return [Record.factored(index, bands) for index in range(2)]


@pytest.fixture
def arena(library):
    with Arena(
        library, device_address=1 << 20, size=1 << 20, slots=KEEP_SLOTS, parameters=LINEARS, max_rank=256
    ) as made:
        yield made


def load(arena, bands=BANDS):
    slot = arena.reserve(tenant(bands))
    arena.commit(slot)
    return slot


def test_slot_life(arena):
    slot = arena.reserve(tenant())
    assert arena.state(slot) == Arena.LOADING
    assert not any(map(any, arena.directory_rows(slot))), "a slot being loaded must not be visible"
    arena.commit(slot)
    assert arena.state(slot) == Arena.RESIDENT
    assert arena.directory_rows(slot)[0][Field.BAND_COUNT] == len(BANDS)
    arena.evict(slot)
    assert arena.state(slot) == Arena.FREE
    assert arena.stats().free_bytes == 1 << 20


def band_fields(row, band):
    at = Field.BANDS + band * BAND_FIELDS
    return row[at : at + BAND_FIELDS]


def shape_of(fields):
    shape = fields[BandField.SHAPE]
    return shape & 255, shape >> 8 & 255, shape >> 16


def test_directory_row_describes_the_payload(arena):
    slot = load(arena)
    place = arena.payload(slot, 1)
    row = arena.directory_rows(slot)[1]
    assert len(row) == DIRECTORY_FIELDS
    assert row[Field.KIND] == RecordKind.FACTORED + 1
    assert row[: Field.HEADER] == [3, 0, 16 + 32 + 96]
    assert row[Field.HEADER] == place.offset
    assert row[Field.V_GROUP_SIZE : Field.U_GROUP_OFFSET + 1] == [128, 0, 128, 0]
    bands = [band_fields(row, band) for band in range(3)]
    assert [shape_of(fields) for fields in bands] == [(8, 1, 2), (3, 1, 32), (2, 1, 90)]
    offsets = [row[Field.HEADER], row[Field.SIGMA], *(f[part] for f in bands for part in (BandField.V, BandField.U))]
    assert all(offset % 256 == 0 for offset in offsets)
    assert len(set(offsets)) == len(offsets) and max(offsets) < place.offset + place.bytes
    assert not any(row[Field.BANDS + 3 * BAND_FIELDS :]), "bands that the record lacks are zero"


@pytest.mark.parametrize(("rank", "expected"), [(968, 1.01), (2, 1.6)])
def test_kernel_order_costs_little(library, rank, expected):
    """Absent ranks take no space: the arena's bytes stay near the file's (alignment shows in tiny records)."""
    parameters = [Parameter(ParameterKind.LINEAR, 4096, 4096, 0, 0)]
    with Arena(library, device_address=0, size=256, slots=1, parameters=parameters, max_rank=4096) as arena:
        bytes_taken = arena.tenant_bytes(
            [Record.factored(0, [(8, 2, "affine"), (3, 32, "affine"), (2, rank, "affine")])]
        )
    file_bytes = 2 * (4096 * (16 + 96 + 2 * rank) // 8 + (34 + rank) * 32 * 4) + 4 * (34 + rank)
    assert file_bytes <= bytes_taken <= expected * file_bytes


def test_full_arena_says_what_is_missing(library, arena):
    size = arena.tenant_bytes(tenant())
    short = size - 256
    with Arena(library, device_address=0, size=short, slots=1, parameters=LINEARS, max_rank=256) as tight:
        with pytest.raises(ArenaFullError, match=f"a tenant of {size} bytes, {short} of {short} bytes free"):
            tight.reserve(tenant())
        assert tight.stats().free_slots == 1, "a failed reservation takes nothing"
        assert tight.stats().free_bytes == short


def test_no_free_slot(arena):
    for _ in range(KEEP_SLOTS):
        load(arena, [(2, 4, "affine")])
    with pytest.raises(ArenaFullError, match="all 3 slots are taken"):
        load(arena)


def test_bytes_outlive_the_steps_that_use_them(arena):
    slot = load(arena)
    first, second = arena.begin_step([slot, -1, slot]), arena.begin_step([slot])
    arena.evict(slot)
    assert arena.state(slot) == Arena.RETIRED
    assert not any(map(any, arena.directory_rows(slot)))
    with pytest.raises(LibraryError, match="holds no resident tenant"):
        arena.begin_step([slot])
    arena.end_step(second)
    assert arena.state(slot) == Arena.RETIRED
    arena.end_step(first)
    assert arena.state(slot) == Arena.FREE
    with pytest.raises(LibraryError, match="is not open"):
        arena.end_step(first)


def test_least_recently_used_skips_pinned_slots(arena):
    a, b, c = (load(arena, [(2, 4, "affine")]) for _ in range(3))
    arena.end_step(arena.begin_step([a]))
    assert arena.least_recent() == b
    arena.pin(b)
    assert arena.least_recent() == c
    with pytest.raises(LibraryError, match="slot 1 is pinned"):
        arena.evict(b)
    arena.unpin(b)
    assert arena.least_recent() == b
    with pytest.raises(LibraryError, match="is not pinned"):
        arena.unpin(b)
    for slot in (a, b, c):
        arena.evict(slot)
    with pytest.raises(ArenaFullError, match="no resident tenant"):
        arena.least_recent()


def test_growing_waits_for_graphs_and_steps(arena):
    arena.acquire_graph()
    with pytest.raises(LibraryError, match="while 1 graphs and 0 steps are live"):
        arena.grow(0, 2 << 20)
    arena.release_graph()
    with pytest.raises(LibraryError, match="expected at least 1048576"):
        arena.grow(0, 1 << 19)
    arena.grow(0, 2 << 20)
    assert arena.stats().free_bytes == 2 << 20
    with pytest.raises(LibraryError, match="no graph is live"):
        arena.release_graph()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 200), st.integers(0, 7)), max_size=30))
def test_payloads_never_overlap(library, actions):
    """Any order of loads and evictions keeps payloads disjoint, inside the buffer, and returns every byte."""
    with Arena(library, device_address=0, size=1 << 20, slots=8, parameters=LINEARS, max_rank=256) as arena:
        held = {}
        for kind, rank, slot in actions:
            if kind < 3:
                try:
                    taken = load(arena, [(2, rank, "affine")])
                except ArenaFullError:
                    continue
                held[taken] = [arena.payload(taken, index) for index in range(2)]
            elif slot in held:
                arena.evict(slot)
                del held[slot]
            ranges = sorted((p.offset, p.offset + p.bytes) for places in held.values() for p in places)
            assert all(a[1] <= b[0] for a, b in pairwise(ranges))
            assert not ranges or ranges[-1][1] <= 1 << 20
        for slot in held:
            arena.evict(slot)
        stats = arena.stats()
        assert stats.free_bytes == stats.largest_free_bytes == 1 << 20


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(5, 2, "affine")], "5 bits, expected 1, 2, 3, 4, 8 or 16"),
        ([(2, 0, "affine")], "rank 0, expected at least 1"),
        ([(16, 2, "affine")], "16 bits have no grid"),
        ([(2, 2, "none")], "16 bits have no grid"),
        ([(2, 200, "affine"), (3, 57, "affine")], "rank 257, the arena takes up to 256"),
    ],
)
def test_bad_bands_are_refused(arena, bands, message):
    with pytest.raises(LibraryError, match=message):
        arena.reserve([Record.factored(0, bands)])
    assert arena.stats().free_slots == KEEP_SLOTS


@pytest.mark.parametrize(
    ("sizes", "offsets", "message"),
    [
        ((64, 128), (0, 0), "v_group_size 64, the kernels take multiples of 128"),
        ((128, -128), (0, 0), "u_group_size -128"),
        ((128, 128), (128, 0), "v_group_offset 128 with a group size of 128"),
        ((128, 128), (32, 0), "v_group_offset 32 does not belong to a shard with offset 0"),
        ((None, 128), (5, 0), "v_group_offset 5 with a group size of 0"),
    ],
)
def test_bad_groups_are_refused(arena, sizes, offsets, message):
    with pytest.raises(LibraryError, match=message):
        arena.reserve([Record.factored(0, BANDS, sizes, offsets)])


def test_bad_records_are_refused(arena):
    with pytest.raises(LibraryError, match="parameter 2, expected 0 to 1"):
        arena.reserve([Record.factored(2, BANDS)])
    with pytest.raises(LibraryError, match="parameter 0 comes twice"):
        arena.reserve([Record.factored(0, BANDS), Record.factored(0, BANDS)])
    with pytest.raises(LibraryError, match="9 bands, expected 1 to 8"):
        Record.factored(0, [(2, 1, "affine")] * 9)
    with pytest.raises(LibraryError, match="grid 'fixed'"):
        Record.factored(0, [(2, 1, "fixed")])


@pytest.mark.parametrize("slot", [-1, KEEP_SLOTS])
def test_slots_outside_the_arena_are_refused(arena, slot):
    for call in (arena.commit, arena.evict, arena.state, arena.pin, arena.directory_rows):
        with pytest.raises(LibraryError, match=f"slot {slot}"):
            call(slot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_address": 100}, "is not a multiple of 256"),
        ({"slots": 0}, "arena of 0 slots"),
        ({"max_rank": 4097}, "max_rank 4097, expected 1 to 4096"),
        ({"parameters": [Parameter(0, 32769, 8, 0, 0)]}, "in_features 32769"),
        ({"parameters": [Parameter(0, 8, 262145, 0, 0)]}, "out_features 262145"),
        ({"parameters": [Parameter(0, 8, 8, 128, 0)]}, "in_offset 128"),
    ],
)
def test_bad_arenas_are_refused(library, change, message):
    good = {"device_address": 0, "size": 1 << 16, "slots": 1, "parameters": LINEARS, "max_rank": 16}
    with pytest.raises(LibraryError, match=message):
        Arena(library, **(good | change))


def good_gemm(library):
    """Arguments that pass every check; the addresses are never read."""
    gemm = Gemm(
        arena=256, directory=256, parameter_count=2, slot_count=4, max_rank=128, dtype=0, token_count=4,
        in_features=256, x=256, x_stride=256, plan=256, slice_count=1, workspace=256,
    )  # fmt: skip
    gemm.slices[0].parameter = 1
    gemm.slices[0].out_features = gemm.slices[0].y_stride = 384
    gemm.slices[0].y = 256
    gemm.workspace_bytes = library.workspace_bytes(gemm)
    return gemm


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_count", 0, "token_count 0, expected 1 to 2048"),
        ("token_count", 2049, "token_count 2049"),
        ("slice_count", 5, "slice_count 5, expected 1 to 4"),
        ("dtype", 2, "dtype 2, expected 0 to 1"),
        ("max_rank", 5000, "max_rank 5000"),
        ("in_features", 0, "in_features 0"),
        ("in_offset", -1, "in_offset -1"),
        ("chunk_tokens", 16, "chunk_tokens 16, expected 0, 8 or 128"),
        ("parameter_count", 1, "parameter of a slice 1, expected 0 to 0"),
    ],
)
def test_bad_sizes_are_refused(library, field, value, message):
    gemm = good_gemm(library)
    setattr(gemm, field, value)
    with pytest.raises(LibraryError, match=message):
        library.workspace_bytes(gemm)


@pytest.mark.parametrize(
    ("weights", "stride", "message"),
    [(258, 1, "weights is not aligned to 4 bytes"), (256, -1, "weights_stride -1, expected 0")],
)
def test_bad_weights_are_refused(library, weights, stride, message):
    gemm = good_gemm(library)
    gemm.weights, gemm.weights_stride = weights, stride
    with pytest.raises(LibraryError, match=message):
        library.delta_gemm(gemm)


def test_gated_lora_needs_weights(library):
    gemm = good_gemm(library)
    with pytest.raises(LibraryError, match=r"no weights, expected float \[token_count, 8\]"):
        library.gated_lora(gemm)


def good_gate():
    batch = Batch(arena=256, directory=256, slots=256, parameter_count=2, slot_count=4, token_count=4, dtype=0)
    return Gate(batch=batch, parameter=1, features=64, x=256, x_stride=64, weights=256, weights_stride=8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parameter", 2, "parameter 2, expected 0 to 1"),
        ("features", 0, "features 0"),
        ("x", 257, "x is not aligned to 2 bytes"),
        ("x_stride", 63, "x_stride 63, expected 64"),
        ("weights", 258, "weights is not aligned to 4 bytes"),
        ("weights_stride", 7, "weights_stride 7, expected 8"),
    ],
)
def test_bad_gates_are_refused(library, field, value, message):
    gate = good_gate()
    setattr(gate, field, value)
    with pytest.raises(LibraryError, match=message):
        library.gate_weights(gate)


def test_mix_and_lora_rows(library):
    """A gate's directory row leads to its numbers and weight; without a weight to its numbers alone."""
    parameters = [Parameter(ParameterKind.GATE, 100, 1, 0, 0), Parameter(ParameterKind.LINEAR, 100, 60, 0, 0)]
    with Arena(library, device_address=0, size=1 << 20, slots=2, parameters=parameters, max_rank=64) as arena:
        gated = arena.reserve([Record.mix(0, 3, True), Record.lora(1, [5, 0, 17])])
        fixed = arena.reserve([Record.mix(0, 2, False)])
        for slot in (gated, fixed):
            arena.commit(slot)
        gate, linear = arena.directory_rows(gated)
        place = arena.payload(gated, 0)
        assert gate[Field.KIND] == RecordKind.MIX + 1 and gate[Field.ROWS] == 3
        assert gate[Field.HEADER] == place.offset and gate[Field.VALUES] == place.offset + 256
        assert place.bytes == 256 + 1280
        assert linear[Field.KIND] == RecordKind.LORA + 1 and linear[Field.PADDED_RANK] == 16 + 32
        assert [shape_of(band_fields(linear, band)) for band in range(3)] == [(16, 0, 5), (16, 0, 0), (16, 0, 17)]
        row = arena.directory_rows(fixed)[0]
        assert row[Field.ROWS] == 2 and row[Field.VALUES] == 0 and not any(row[Field.BANDS :])


def test_workspace_holds_the_intermediates(library):
    gemm = good_gemm(library)
    least = 4 * 256 * 2 + 4 * 128 * 4
    assert least < gemm.workspace_bytes < 8 * least
    assert gemm.workspace_bytes % 256 == 0
    gemm.token_count = 8
    assert library.workspace_bytes(gemm) > gemm.workspace_bytes


def test_workspace_of_prefill_grows_with_the_dense_slots(library):
    """Images of 128 tokens for every slot that can have so many; none where there is no such slot."""
    gemm = good_gemm(library)

    def size(tokens, chunk, slots):
        gemm.token_count, gemm.chunk_tokens, gemm.slot_count = tokens, chunk, slots
        return library.workspace_bytes(gemm)

    image = 2 * 128 * 256  # of x
    assert size(127, 128, 4) == size(127, 8, 4)
    assert size(256, 0, 4) == size(256, 8, 4) < size(256, 128, 4) - 4 * image
    assert size(257, 0, 4) == size(257, 128, 4)
    assert size(1024, 128, 4) == size(1024, 128, 3) + (size(1024, 128, 3) - size(1024, 128, 2))
    assert size(256, 128, 4) == size(256, 128, 2) > size(256, 128, 1) + image


def test_plan_bytes(library):
    assert library.plan_bytes(1) == 4 * (8 + 2 * 4 + 4)
    with pytest.raises(LibraryError, match="token_count 2049"):
        library.plan_bytes(2049)


def test_library_without_kernels_says_so(library):
    if library.has_cuda:
        pytest.skip("this library has kernels")
    with pytest.raises(LibraryError, match="dw_delta_gemm: this libdeltaweave was built without CUDA"):
        library.delta_gemm(good_gemm(library))


def test_halves_of_a_product(library):
    """The first needs no y that it leaves alone; prefill has none."""
    if library.has_cuda:
        pytest.skip("this library has kernels")
    gemm = good_gemm(library)
    gemm.slices[0].y = None
    with pytest.raises(LibraryError, match="dw_delta_shrink: this libdeltaweave was built without CUDA"):
        library.delta_shrink(gemm)
    with pytest.raises(LibraryError, match="y is"):
        library.delta_expand(gemm)
    gemm.slices[0].base, gemm.slices[0].base_stride = 256, 256
    with pytest.raises(LibraryError, match="y is"):
        library.delta_shrink(gemm)
    gemm.slices[0].base = None
    gemm.token_count, gemm.chunk_tokens, gemm.slot_count, gemm.slices[0].y = 256, 128, 4, 256
    gemm.workspace_bytes = library.workspace_bytes(gemm)
    with pytest.raises(LibraryError, match="256 tokens with chunk_tokens 128 are prefill, which has no halves"):
        library.delta_shrink(gemm)


def with_base(library):
    """The same of two slices that have weights of the base."""
    gemm = good_gemm(library)
    gemm.slice_count, gemm.slices[1] = 2, gemm.slices[0]
    for place in range(2):
        gemm.slices[place].base, gemm.slices[place].base_stride = 256, 256
    gemm.workspace_bytes = library.workspace_bytes(gemm)
    return gemm


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_count": 9}, "token_count with a base 9, expected 1 to 8"),
        ({"in_features": 252}, "in_features with a base 252, expected a multiple of 8"),
        ({"x_stride": 260}, "x_stride with a base 260, expected a multiple of 8"),
        ({"x": 264}, "x with a base is not aligned to 16 bytes"),
    ],
)
def test_bases_that_no_kernel_takes_are_refused(library, fields, message):
    gemm = with_base(library)
    for field, value in fields.items():
        setattr(gemm, field, value)
    gemm.workspace_bytes = library.workspace_bytes(gemm)
    for call in (library.delta_gemm, library.delta_shrink):
        with pytest.raises(LibraryError, match=message):
            call(gemm)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("base", 264, "base is not aligned to 16 bytes"),
        ("base", None, "base is null"),
        ("base_stride", 248, "base_stride 248, expected 256 to"),
        ("base_stride", 260, "base_stride 260, expected a multiple of 8"),
    ],
)
def test_bad_weights_of_a_base_are_refused(library, field, value, message):
    gemm = with_base(library)
    setattr(gemm.slices[1], field, value)
    with pytest.raises(LibraryError, match=message):
        library.delta_gemm(gemm)


def test_who_computes_the_base(library):
    """Deltas alone: gated LoRAs and dense rows come behind them on the same y."""
    gemm = with_base(library)
    gemm.slices[0].base = None
    with pytest.raises(LibraryError, match="base of slice 1 of a call whose first has none, expected NULL"):
        library.delta_gemm(gemm)
    gemm = good_gemm(library)
    gemm.slices[0].base = 256
    with pytest.raises(LibraryError, match="base of slice 0 of a dense product, expected NULL"):
        library.dense_gemm(gemm)
    gemm.weights, gemm.weights_stride = 256, 8
    with pytest.raises(LibraryError, match="base of slice 0 of LoRAs, expected NULL"):
        library.gated_lora(gemm)


def test_build_without_a_cuda_compiler_is_skipped(tmp_path):
    """Asking for kernels where there is no nvcc configures, says what is missing, and builds nothing."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "make", "ninja", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    command = [cmake, "-S", str(Path(__file__).parents[2]), "-B", str(tmp_path / "build"), "-DDELTAWEAVE_CUDA=ON"]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no CUDA compiler found, libdeltaweave is not built" in done.stdout


def test_closed_arena(library):
    arena = Arena(library, device_address=0, size=256, slots=1, parameters=LINEARS, max_rank=16)
    arena.close()
    arena.close()
    with pytest.raises(LibraryError, match="the arena is closed"):
        arena.stats()


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAWEAVE_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(LibraryError, match=r"none\.so does not load"):
        Library()
    monkeypatch.delenv("DELTAWEAVE_LIBRARY")
    if find_library() is None:
        with pytest.raises(LibraryError, match="was not built"):
            Library()


def test_structs_have_the_size_of_the_header():
    """Ctypes and C agree on layout: the sizes that deltaweave.h's structs have on 64-bit machines."""
    assert ctypes.sizeof(Record) == 4 * (5 + 3 * 8 + 4)
    assert ctypes.sizeof(Gemm) == 8 * 2 + 4 * 8 + 8 * 3 + 8 + 4 * 48 + 16 + 16
    assert ctypes.sizeof(RepackArgs) == 4 * 33 + 4 * 5 + 8 * 10
    assert ctypes.sizeof(Batch) == 8 * 4 + 4 * 4
    assert ctypes.sizeof(Norm) == 48 + 4 * 4 + 8 * 7
    assert ctypes.sizeof(Bias) == 48 + 8 + 4 * 32
    assert ctypes.sizeof(Embedding) == 48 + 4 * 4 + 8 * 5
    assert ctypes.sizeof(Gate) == 48 + 4 * 2 + 8 * 4
