# SPDX-License-Identifier: Apache-2.0
"""Deltas in several files, replacing them, and cutting records for tensor parallelism."""

import json
import random

import numpy as np
import pytest
from deltaweave.formats import Delta, DeltaweaveError, DenseRecord, FormatError, apply_record, shard, write_delta
from fuzz_reader import altered
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import FILES, make_header, make_records

SHARD_BYTES = 2000


def write(folder, seed=0, **options):
    options = {"max_shard_bytes": SHARD_BYTES, "files": FILES} | options
    return write_delta(folder / "d.safetensors", make_header(), make_records(seed), **options)


def values(path):
    with Delta.open(path) as delta:
        assert delta.verify() == []
        return {name: apply_record(record, None).tobytes() for name, record in delta.records()}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def rewrite_index(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_shards_stay_below_their_limit_unless_one_record_is_larger(tmp_path):
    index = write(tmp_path)
    weight_map = json.loads(index.read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    for file in set(weight_map.values()):
        records = {name.removesuffix(".u.codes") for name in weight_map if weight_map[name] == file}
        size = (tmp_path / file).stat().st_size
        assert size < SHARD_BYTES + 1024 or len({name.rsplit(".weight.")[0] for name in records}) == 1


@pytest.mark.parametrize("before", [None, SHARD_BYTES])
@pytest.mark.parametrize("after", [None, 3000, SHARD_BYTES])
def test_force_replaces_all_of_the_older_delta(tmp_path, before, after):
    write(tmp_path, 0, max_shard_bytes=before)
    path = write(tmp_path, 1, max_shard_bytes=after, force=True)
    (tmp_path / "clean").mkdir()
    expected = write(tmp_path / "clean", 1, max_shard_bytes=after)
    assert names(tmp_path) == sorted([*names(tmp_path / "clean"), "clean"])
    assert values(path) == values(expected)


def test_sharded_output_is_not_overwritten_without_force(tmp_path):
    index = write(tmp_path)
    before = names(tmp_path)
    with pytest.raises(DeltaweaveError, match=r"d.safetensors.index.json: exists \(--force"):
        write(tmp_path, 1)
    assert names(tmp_path) == before
    assert values(index)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_any_shard_keeps_the_older_delta(tmp_path, monkeypatch, failing, seed, failure):
    """Also when the same delta is written again (seed 0), whose shards have the same names."""
    index = write(tmp_path, 0)
    before, content = names(tmp_path), values(index)
    calls = iter(range(1, 100))

    def fsync(_):
        if next(calls) == failing * 2 - 1:  # each file is synchronized, and then its folder
            raise failure

    monkeypatch.setattr("deltaweave.formats.container.os.fsync", fsync)
    with pytest.raises((DeltaweaveError, KeyboardInterrupt)):
        write(tmp_path, seed, force=True)
    assert names(tmp_path) == before
    assert values(index) == content


def test_a_foreign_index_never_costs_a_foreign_shard(tmp_path):
    """An output named like the checkpoint it lies beside: --force replaces the index, and deletes no weights."""
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "../other", "c": 3}})
    )
    write_delta(tmp_path / "model.safetensors", make_header(), make_records(), force=True)
    assert (tmp_path / "model-00001-of-00001.safetensors").read_bytes() == b"weights"


def test_one_shard_is_not_a_delta(tmp_path):
    write(tmp_path)
    shard_path = sorted(tmp_path.glob("d-*.safetensors"))[0]
    with pytest.raises(FormatError, match=r"is one shard of a delta; open its \.index\.json"):
        Delta.open(shard_path)


def test_weight_map_that_misplaces_a_tensor(tmp_path):
    index = write(tmp_path)

    def swap(content):
        weight_map = content["weight_map"]
        weight_map["model.norm.weight.values"] = weight_map["lm_head.weight.values"]
        weight_map["lm_head.weight.values"] = weight_map["model.layers.0.self_attn.q_proj.weight.sigma"]

    rewrite_index(index, swap)
    with pytest.raises(FormatError, match=r"weight_map does not say where tensor lm_head\.weight\.values lies"):
        Delta.open(index)


@pytest.mark.parametrize("file", ["../d.safetensors", "/etc/passwd", "", "..", "a\u0000b", "\ud800", 3, None, ["x"]])
def test_weight_map_that_leads_elsewhere(tmp_path, file):
    index = write(tmp_path)
    rewrite_index(index, lambda content: content["weight_map"].update({"model.norm.weight.values": file}))
    with pytest.raises(FormatError, match=r"shard .* is missing"):
        Delta.open(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metadata": {}, "weight_map": {}}', "[" * 100_000, "\ufeff{}"])
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "d.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"d\.safetensors\.index\.json"):
        Delta.open(tmp_path / "d.safetensors.index.json")


def test_a_closed_delta_says_so(tmp_path):
    with Delta.open(write(tmp_path)) as delta:
        pass
    for use in (delta.record, delta.dequantize):
        with pytest.raises(FormatError, match="is closed"):
            use("model.embed_tokens.weight")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(make_records())), st.sampled_from(["out", "in"]), st.data())
def test_a_shard_of_any_record_is_a_slice(tmp_path_factory, name, axis, data):
    record = make_records()[name]
    if axis == "in" and len(record.shape) < 2:
        axis = "out"
    extent = record.shape[0 if axis == "out" else 1]
    start = data.draw(st.integers(0, extent - 1))
    stop = data.draw(st.integers(start + 1, extent))
    base = np.random.default_rng(0).standard_normal(record.shape).astype(np.float32)
    where = np.s_[start:stop] if axis == "out" else np.s_[:, start:stop]
    part = shard(record, axis, start, stop)
    np.testing.assert_allclose(apply_record(part, base[where]), apply_record(record, base)[where], rtol=1e-5, atol=1e-5)
    path = write_delta(tmp_path_factory.mktemp("s") / "d.safetensors", make_header(), {name: part})
    with Delta.open(path) as delta:
        assert delta.verify() == []
        assert np.array_equal(delta.apply_to(name, base[where]), apply_record(part, base[where]))


def test_shards_of_one_scale_matrices_share_it():
    record = make_records()["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(record, DenseRecord)
    parts = [shard(shard(record, "out", 0, 7), "in", 0, 9), shard(shard(record, "out", 0, 7), "in", 9, 30)]
    joined = np.concatenate([part.dequantize() for part in parts], axis=1)
    assert np.array_equal(joined, record.dequantize()[:7])


@pytest.mark.parametrize(("axis", "start", "stop"), [("out", 0, 0), ("out", -1, 3), ("out", 3, 41), ("in", 24, 25)])
def test_shards_outside_the_parameter_are_refused(axis, start, stop):
    record = make_records()["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(FormatError, match=r"shard .* of a parameter of shape \[40, 24\]"):
        shard(record, axis, start, stop)
    with pytest.raises(FormatError, match=r"along in of a parameter of shape \[24\]"):
        shard(make_records()["model.norm.weight"], "in", 0, 1)


def test_damaged_indexes_are_refused_or_read(tmp_path):
    index = write(tmp_path)
    content = json.loads(index.read_text())
    chance = random.Random(0)
    refused = 0
    for _ in range(600):
        index.write_text(json.dumps(altered(content, chance)))
        try:
            with Delta.open(index) as delta:
                assert delta.verify() == []
        except FormatError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 500


def test_a_folder_is_no_output_even_with_force(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(DeltaweaveError, match=r"d\.safetensors: is a folder"):
        write(tmp_path, force=True)
    assert names(tmp_path) == ["d.safetensors"]
