# SPDX-License-Identifier: Apache-2.0
"""One test per abuse: the error names the thing, and nothing is allocated or crashed."""

import json
import struct

import numpy as np
import pytest
from deltaweave.formats import Delta, DeltaweaveError, FormatError, write_delta
from samples import make_header, make_records, pack_file, sample_bytes, split_file

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sample_bytes(tmp_path_factory.mktemp("sample"))


def refuse(data, message):
    with pytest.raises(FormatError, match=message) as caught:
        delta = Delta.from_bytes(data)
        for name in delta.names:
            delta.record(name)
        problems = delta.verify()
        if problems:
            raise FormatError(str(problems[0]))
    assert "\n" not in str(caught.value)


def with_inner(data, change):
    outer, inner, section = split_file(data)
    change(inner)
    return pack_file(outer, inner, section)


def with_record(data, name=Q_PROJ, **changes):
    return with_inner(data, lambda inner: inner["records"][name].update(changes))


@pytest.mark.parametrize("length", [0, 7, 8, 100])
def test_truncated_head(data, length):
    refuse(data[:length], "too short|header of")


def test_truncated_data(data):
    refuse(data[:-1], "lie outside the data section|behind the last")


def test_header_length_beyond_the_file(data):
    refuse(struct.pack("<Q", 2**62) + data[8:], "header of 4611686018427387904 bytes")


def test_bytes_behind_the_last_tensor(data):
    refuse(data + b"x", "1 bytes behind the last tensor")


def test_not_a_delta(tmp_path):
    from safetensors.numpy import save

    refuse(save({"a": np.zeros(4, np.float32)}), "format 'None', expected 'deltaweave.delta'")


def test_overlapping_tensors(data):
    outer, inner, section = split_file(data)
    outer[f"{Q_PROJ}.u.codes"]["data_offsets"] = outer[f"{Q_PROJ}.v.codes"]["data_offsets"]
    refuse(pack_file(outer, inner, section), "does not take|overlaps|leaves a hole")


def test_hole(data):
    outer, inner, section = split_file(data)
    del outer[f"{Q_PROJ}.sigma"]
    refuse(pack_file(outer, inner, section), "leaves a hole")


def test_missing_tensor(data):
    outer, inner, section = split_file(data)
    outer["other"] = outer.pop(f"{Q_PROJ}.sigma")
    refuse(pack_file(outer, inner, section), "belongs to no record|is missing")


def test_shape_that_overflows(data):
    outer, inner, section = split_file(data)
    outer[f"{Q_PROJ}.sigma"]["shape"] = [2**62, 4]
    refuse(pack_file(outer, inner, section), "more values than the file has bits")


def test_deep_nesting(data):
    outer, _, section = split_file(data)
    refuse(pack_file(outer, "[" * 100_000, section), "not valid JSON")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_are_none(data, number):
    outer, inner, section = split_file(data)
    text = json.dumps(inner).replace('"rank": 2', f'"rank": {number}', 1)
    refuse(pack_file(outer, text, section), "not valid JSON|expected an integer")


def test_duplicate_keys(data):
    outer, inner, section = split_file(data)
    refuse(pack_file(outer, json.dumps(inner)[:-1] + ', "records": {}}', section), "duplicate key")


def test_newer_major_version(data):
    refuse(with_inner(data, lambda inner: inner.update(version="2.0")), "format version 2.0, this reader knows 1.x")


def test_unknown_keys_of_a_newer_minor_version_are_ignored(data):
    def change(inner):
        inner.update(version="1.7", novelty=1)
        inner["base"]["novelty"] = inner["records"][Q_PROJ]["novelty"] = {}

    assert Delta.from_bytes(with_inner(data, change)).verify() == []


def test_unknown_keys_of_this_version_are_refused(data):
    refuse(with_inner(data, lambda inner: inner.update(novelty=1)), "unknown key 'novelty'")
    refuse(with_record(data, novelty=1), "unknown key 'novelty'")


def test_unknown_record_kind(data):
    refuse(with_record(data, kind="magic"), "kind: 'magic', expected one of base, dense")


def test_lying_rank(data):
    bands = [{"bits": 8, "rank": 2**30, "grid": "affine"}]
    refuse(with_record(data, bands=bands), "bytes stored|expected")


def test_lying_shape(data):
    refuse(with_record(data, shape=[40, 2**31 - 1]), "expected|bytes stored|stored")
    refuse(with_record(data, shape=[40, 2**31]), r"integers in \[1, 2147483647\]")


def test_too_many_bands(data):
    refuse(with_record(data, bands=[{"bits": 1, "rank": 1, "grid": "affine"}] * 9), "list of 1 to 8 bands")


@pytest.mark.parametrize("bits", [0, 5, 7, 9, 32])
def test_other_bit_widths(data, bits):
    refuse(with_record(data, bands=[{"bits": bits, "rank": 1, "grid": "affine"}]), "expected")


def test_zero_group_size(data):
    refuse(with_record(data, group_size=0), r"group_size: expected an integer in \[1, 65536\]")


def test_group_offset_outside_its_group(data):
    refuse(with_record(data, v_group_offset=16), r"v_group_offset: expected an integer in \[0, 15\]")


@pytest.mark.parametrize("part", ["sigma", "v.grid", "u.grid"])
def test_numbers_that_are_not_finite(data, part):
    outer, inner, section = split_file(data)
    start = outer[f"{Q_PROJ}.{part}"]["data_offsets"][0]
    poison = b"\x00\x00\xc0\x7f" if part == "sigma" else b"\x00\x7e"
    section = section[:start] + poison + section[start + len(poison) :]
    refuse(pack_file(outer, inner, section), rf"{Q_PROJ}.*{part}.* not finite float")


def test_row_indices_outside_the_matrix(data):
    outer, inner, section = split_file(data)
    start = outer["lm_head.weight.indices"]["data_offsets"][0]
    section = section[:start] + struct.pack("<i", 99) + section[start + 4 :]
    refuse(pack_file(outer, inner, section), "rise strictly")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", ".hidden", "a/b", "", "a" * 200])
def test_carried_file_names(data, name):
    def change(inner):
        inner["files"][name] = inner["files"].pop("chat_template.jinja")

    refuse(with_inner(data, change), "not an allowed file name")


def test_every_flipped_bit_of_the_data_is_found(data):
    outer, _, section = split_file(data)
    head = len(data) - len(section)
    chance = np.random.default_rng(0)
    for name, entry in outer.items():
        if name == "__metadata__":
            continue
        at = head + int(chance.integers(*entry["data_offsets"]))
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(chance.integers(8))
        assert name_found(bytes(damaged), name), name


def name_found(damaged, tensor):
    return any(
        tensor.startswith(problem.tensor) or tensor in str(problem) for problem in Delta.from_bytes(damaged).verify()
    )


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match=r"gone.safetensors: not readable \(No such file"):
        Delta.open(tmp_path / "gone.safetensors")


def test_empty_file(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(FormatError, match=r"empty\.safetensors: not readable"):
        Delta.open(tmp_path / "empty.safetensors")


def test_existing_output_is_kept_without_force(tmp_path):
    path = tmp_path / "d.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(DeltaweaveError, match="exists"):
        write_delta(path, make_header(), make_records())
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    path = tmp_path / "d.safetensors"
    path.write_bytes(b"precious")

    def fail(_):
        raise failure

    monkeypatch.setattr("deltaweave.formats.container.os.fsync", fail)
    expected = DeltaweaveError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_delta(path, make_header(), make_records(), force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]
    assert path.read_bytes() == b"precious"


def test_shards_of_different_files_do_not_mix(tmp_path):
    one = write_delta(tmp_path / "one.safetensors", make_header(), make_records(0), max_shard_bytes=2000)
    write_delta(tmp_path / "two.safetensors", make_header(), make_records(1), max_shard_bytes=2000)
    shard = sorted(tmp_path.glob("one-*.safetensors"))[0]
    shard.write_bytes(sorted(tmp_path.glob("two-*.safetensors"))[0].read_bytes())
    with pytest.raises(FormatError, match="another"):
        Delta.open(one)


def test_missing_shard_is_named(tmp_path):
    index = write_delta(tmp_path / "one.safetensors", make_header(), make_records(0), max_shard_bytes=2000)
    shard = sorted(tmp_path.glob("one-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FormatError, match=f"shard {shard.name} is missing"):
        Delta.open(index)
