# SPDX-License-Identifier: Apache-2.0
"""What reading and writing may cost in memory and time, and what records no writer may make."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from deltaweave.formats import (
    Band,
    BaseRecord,
    Container,
    Delta,
    DenseRecord,
    ExactArray,
    FactoredRecord,
    FormatError,
    PackedBand,
    PackedMatrix,
    ReplaceRecord,
    RowsRecord,
    apply_record,
    load_records,
    pack_codes,
    sampled_fingerprint,
    save_records,
    write_delta,
)
from samples import make_factored, make_header, make_matrix, make_records, pack_file, sample_bytes, split_file

MIB = 1 << 20


def peak(action):
    """Bytes that `action` allocates at once; numpy reports its arrays here, mapped files do not count."""
    tracemalloc.start()
    try:
        result = action()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A delta of 40 MiB, as records mapped from a file."""
    generator = np.random.default_rng(0)
    record = make_factored(generator, (4096, 4096), [Band(8, 300), Band(4, 1000)], 128)
    path = tmp_path_factory.mktemp("large") / "records.safetensors"
    save_records(path, {f"layers.{layer}.weight": record for layer in range(6)}, {})
    assert path.stat().st_size > 35 * MIB
    return path


def test_opening_and_taking_records_reads_no_data(tmp_path, large):
    path = write_delta(tmp_path / "d.safetensors", make_header(), load_records(large)[0])
    used, delta = peak(lambda: Delta.open(path))
    assert used < MIB
    used, record = peak(lambda: delta.record("layers.3.weight"))
    assert used < MIB
    assert not record.u.bands[0].codes.flags.owndata
    assert not record.u.bands[0].codes.flags.writeable


def test_writing_streams_from_mapped_files(tmp_path, large):
    used, path = peak(lambda: write_delta(tmp_path / "d.safetensors", make_header(), load_records(large)[0]))
    assert path.stat().st_size > 35 * MIB
    assert used < 2 * MIB


def test_dequantizing_holds_little_but_the_result():
    matrix = make_matrix(np.random.default_rng(0), [Band(3, 2000), Band(1, 1000)], 4096, 128)
    used, values = peak(matrix.dequantize)
    assert used < values.nbytes + 8 * MIB


@pytest.mark.parametrize("filling", ["[]", "{}", "0", '""', "[[[]]]"])
def test_a_header_takes_a_small_multiple_of_its_bytes(tmp_path, filling):
    """Whatever JSON is in it: an empty list is 3 bytes there and 64 in memory."""
    outer, inner, section = split_file(sample_bytes(tmp_path))
    text = json.dumps(inner)[:-1] + ', "novelty": [' + ",".join([filling] * 15_000) + "]}"
    data = pack_file(outer, text, section)

    def read():
        with pytest.raises(FormatError, match="unknown key 'novelty'"):
            Delta.from_bytes(data)

    assert peak(read)[0] < 40 * len(data)


def test_lying_headers_allocate_nothing(tmp_path):
    data = sample_bytes(tmp_path)
    outer, inner, section = split_file(data)
    for entry in inner["records"].values():
        for key, value in entry.items():
            if type(value) is int:
                entry[key] = 2**31 - 1
        entry["shape"] = [2**31 - 1] * len(entry["shape"])
    lying = pack_file(outer, inner, section)

    def read():
        delta = Delta.from_bytes(lying)
        for name in delta.names:
            if not isinstance(make_records()[name], BaseRecord):  # a base record has no bytes that could belie it
                with pytest.raises(FormatError):
                    delta.record(name)

    assert peak(read)[0] < 2 * MIB


@pytest.mark.parametrize("shape", [(2**31 - 1, 24), (2**31 - 1,) * 16])
def test_a_shape_beyond_memory_is_an_error(shape):
    with pytest.raises(FormatError, match=r"a parameter of shape \[2147483647, .* does not fit into memory"):
        apply_record(BaseRecord(shape), None)


def test_the_fingerprint_of_a_large_base_is_quick(tmp_path):
    """291 tensors of 16 MiB, as a 7B model has, in a file without blocks."""
    header, size = {}, 16 * MIB
    for index in range(291):
        offsets = [index * size, (index + 1) * size]
        header[f"t{index}"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": offsets}
    text = json.dumps(header).encode()
    seconds = []
    for attempt in range(3):  # in a new file each time: none of it is in memory yet
        path = tmp_path / f"base-{attempt}.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 291 * size)
        start = time.perf_counter()
        container = Container.open(path)
        sampled_fingerprint({name: container.raw(name) for name in container.tensors})
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2


def test_the_fingerprint_is_what_the_specification_says():
    import hashlib

    raws = {"b": bytes(range(256)) * 2, "a": b"xyz"}
    b = raws["b"]
    expected = b"a" + (3).to_bytes(8, "little") + b"xyz" * 3
    expected += b"b" + (512).to_bytes(8, "little") + b[:64] + b[224:288] + b[448:]
    assert sampled_fingerprint(raws) == hashlib.sha256(expected).hexdigest()


def test_errors_are_one_line_without_escapes():
    error = FormatError("tensor a\nb\x1b[31m\u2028é\udc80")
    assert str(error) == r"tensor a\nb\x1b[31m\u2028é\udc80"


GRID = np.ones((2, 1, 2), np.float16)
CODES = np.zeros((2, 5), np.uint8)


def band(bits=8, codes=CODES, grid=GRID):
    return PackedBand(Band(bits, 2, "affine" if bits < 16 else "none"), codes, grid)


def matrix(piece=None, length=5, group_size=8, group_offset=0, count=1):
    return PackedMatrix((piece or band(),) * count, length, group_size, group_offset)


def factored(**changes):
    given = {"shape": (5, 5), "u": matrix(), "v": matrix(), "sigma": np.ones(2, np.float32)} | changes
    return FactoredRecord(**given)


def exact(shape):
    return ExactArray(np.zeros(shape, np.float32), "F32")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Band(5, 1), "band of 5 bits, expected one of 1, 2, 3, 4, 8, 16"),
        (lambda: Band(2, 0), "band of rank 0"),
        (lambda: Band(16, 1), "band of 16 bits with grid 'affine'"),
        (lambda: Band(2, 1, "cubic"), "band of 2 bits with grid 'cubic'"),
        (lambda: Band(2, 1, "codebook"), "a codebook band, and no other, has levels"),
        (lambda: Band(1, 1, "codebook", (0.0, 1e39)), "needs 2 levels finite in float32"),
        (lambda: Band(1, 1, "codebook", (0.0, float("nan"))), "needs 2 levels finite in float32"),
        (lambda: Band(2, 1, "codebook", (0.0, 1.0)), "needs 4 levels finite in float32, has 2"),
        (lambda: band(codes=CODES.astype(np.int32)), "band of 8 bits has codes of int32"),
        (lambda: band(grid=GRID.astype(np.float32)), "not finite float16"),
        (lambda: band(grid=GRID * np.float16(np.inf)), "not finite float16"),
        (lambda: matrix(count=9), "9 bands, expected 1 to 8"),
        (lambda: matrix(length=6), r"codes and grid of shape \(\(2, 5\), \(2, 1, 2\)\), expected \(\(2, 6\)"),
        (lambda: matrix(group_size=4), r"expected \(\(2, 5\), \(2, 2, 2\)\)"),
        (lambda: matrix(group_size=0), "group_size 0, expected 1 to 65536"),
        (lambda: matrix(group_offset=8), "group_offset 8 lies outside its group of 8"),
        (lambda: matrix(group_size=None, group_offset=1), "group_offset 1 lies outside"),
        (lambda: factored(shape=(5, 6)), r"shape \(5, 6\) has u and v of length \(5, 5\)"),
        (lambda: factored(sigma=np.ones(2)), "sigma has values that are not finite float32"),
        (lambda: factored(sigma=np.array([1, np.nan], np.float32)), "sigma has values that are not finite"),
        (lambda: factored(u=matrix(group_size=16)), "must share a group size"),
        (lambda: factored(u=matrix(band(4, CODES[:, :3]))), "must share their bands"),
        (
            lambda: DenseRecord((2, 5), matrix(band(16, CODES.astype(np.float16), None))),
            "needs one band of 2 rows of 5 values in 1 to 8 bits",
        ),
        (lambda: DenseRecord((3, 5), matrix()), "needs one band of 3 rows of 5"),
        (lambda: RowsRecord((4, 5), np.array([0, 4], np.int32), exact((2, 5))), r"rise strictly within \[0, 4\)"),
        (lambda: RowsRecord((4, 5), np.array([2, 2], np.int32), exact((2, 5))), "rise strictly"),
        (lambda: RowsRecord((4, 5), np.array([0, 1]), exact((2, 5))), "row indices of int64"),
        (lambda: RowsRecord((4, 5), np.array([0], np.int32), exact((2, 5))), "has 1 indices and values of shape"),
        (lambda: ReplaceRecord(exact((2, 0))), r"shape \[2, 0\]"),
        (lambda: BaseRecord((1,) * 17), "at most 16 extents"),
        (lambda: ExactArray(np.zeros(2), "F32"), "array of float64 as F32"),
    ],
)
def test_records_that_cannot_be(make, message):
    with pytest.raises(FormatError, match=message):
        make()


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "é", "files/a", "a" * 513])
def test_names_that_no_parameter_has(tmp_path, name):
    with pytest.raises(FormatError, match="not an allowed parameter name"):
        write_delta(tmp_path / "d.safetensors", make_header(), {name: BaseRecord((2,))})
    outer, inner, section = split_file(sample_bytes(tmp_path, 1))
    inner["records"][name] = inner["records"]["model.norm.weight"]
    with pytest.raises(FormatError, match="not an allowed parameter name"):
        Delta.from_bytes(pack_file(outer, inner, section))


def test_records_whose_tensors_would_be_one(tmp_path):
    dense = DenseRecord((2, 5), matrix())
    with pytest.raises(FormatError, match="two records claim one tensor"):
        write_delta(tmp_path / "d.safetensors", make_header(), {"a": factored(), "a.v": dense})
    assert list(tmp_path.iterdir()) == []


def test_quality_and_method_must_be_json(tmp_path):
    record = BaseRecord((2,), {"weight_error": float("nan")})
    with pytest.raises(FormatError, match="not expressible as JSON"):
        write_delta(tmp_path / "d.safetensors", make_header(), {"a": record})
    assert list(tmp_path.iterdir()) == []


def test_a_wide_group_over_short_rows_is_not_spread_out():
    """65536 values a group over rows of one value: unpacking must not take the group's width a row."""
    rows = 20_000
    codes = pack_codes(np.ones((rows, 1), np.uint8), 1)
    piece = PackedBand(Band(1, rows), codes, np.ones((rows, 1, 2), np.float16))
    used, values = peak(PackedMatrix((piece,), 1, 65536, 65535 - 1).dequantize)
    assert values.shape == (rows, 1)
    assert used < 16 * MIB
