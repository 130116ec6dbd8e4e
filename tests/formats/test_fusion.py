# SPDX-License-Identifier: Apache-2.0
"""Fusion files: what goes in comes out to the bit, and hostile files meet a clear error."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from deltaweave.formats import (
    Delta,
    DeltaExpert,
    DeltaReference,
    DeltaweaveError,
    FixedGate,
    FormatError,
    Fusion,
    LoraReference,
    fusion_digest,
    parse_fusion,
    read_fusion,
    resolve_fusion,
    verify_fusion,
    write_delta,
    write_fusion,
)
from fusions import SHAPES, make_fusion, make_gate, make_lora, same, single
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_header, make_records, pack_file, split_file

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_fusion(tmp_path_factory.mktemp("fusion") / "f.safetensors", make_fusion()).read_bytes()


def equal(one: Fusion, other: Fusion) -> bool:
    for a, b in zip(one.loras, other.loras, strict=True):
        assert list(a.modules) == list(b.modules) and (a.name, a.license) == (b.name, b.license)
        for name in a.modules:
            mine, theirs = a.modules[name], b.modules[name]
            assert same(mine.a, theirs.a) and same(mine.b, theirs.b) and mine.scale == theirs.scale
    if isinstance(one.gate, FixedGate):
        assert one.gate == other.gate
    else:
        assert one.gate.temperature == other.gate.temperature and list(one.gate.blocks) == list(other.gate.blocks)
        for name, block in one.gate.blocks.items():
            assert same(block.weight, other.gate.blocks[name].weight)
            assert same(block.bias, other.gate.blocks[name].bias)
    keys = ("tool", "base", "architecture", "method", "training")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 8), fixed=st.booleans())
def test_round_trip(tmp_path_factory, seed, count, fixed):
    path = tmp_path_factory.mktemp("round") / "f.safetensors"
    gate = FixedGate(tuple(index / 7 for index in range(count))) if fixed else None
    fusion = make_fusion(seed, count, gate)
    write_fusion(path, fusion)
    assert equal(fusion, read_fusion(path))
    assert equal(fusion, parse_fusion(path.read_bytes()))
    assert not verify_fusion(path)


def test_references(tmp_path):
    fusion = make_fusion(count=2)
    lora = fusion.loras[1]
    path = write_fusion(tmp_path / "one.safetensors", single(lora))
    reference = LoraReference("one", path.name, fusion_digest(path))
    joined = write_fusion(tmp_path / "f.safetensors", replace(fusion, experts=(fusion.loras[0], reference)))
    assert read_fusion(joined).experts[1] == reference
    assert equal(resolve_fusion(joined), fusion)

    write_fusion(path, single(fusion.loras[0]), force=True)
    with pytest.raises(FormatError, match="another file than the one"):
        resolve_fusion(joined)
    path.unlink()
    with pytest.raises(FormatError, match="not readable"):
        resolve_fusion(joined)


def test_reference_of_another_base(tmp_path):
    fusion = make_fusion(count=1)
    other = replace(fusion.base, root="11" * 32)
    path = write_fusion(tmp_path / "one.safetensors", single(fusion.loras[0], other))
    reference = LoraReference("one", path.name, fusion_digest(path))
    joined = write_fusion(tmp_path / "f.safetensors", replace(fusion, experts=(reference,)))
    with pytest.raises(FormatError, match="LoRA of base"):
        resolve_fusion(joined)


def test_a_delta_as_an_expert(tmp_path):
    path, base = tmp_path / "tuned.safetensors", make_header().base
    write_delta(path, make_header(), make_records(), files={})
    with Delta.open(path) as delta:
        reference = DeltaReference("tuned", path.name, delta.header_sha256)
        fusion = replace(make_fusion(count=2), base=base)
        fusion = replace(fusion, experts=(fusion.loras[0], reference))
        joined = write_fusion(tmp_path / "f.safetensors", fusion)
        assert read_fusion(joined).experts[1] == reference
        assert not verify_fusion(joined)
        resolved = resolve_fusion(joined).experts[1]
        assert isinstance(resolved, DeltaExpert) and resolved.delta.names == delta.names
        with pytest.raises(FormatError, match="an opened delta, expected a DeltaReference"):
            write_fusion(tmp_path / "g.safetensors", replace(fusion, experts=(fusion.loras[0], resolved)))
    write_fusion(joined, replace(fusion, base=replace(base, root="11" * 32)), force=True)
    with pytest.raises(FormatError, match="delta of base"):
        resolve_fusion(joined)
    write_fusion(joined, fusion, force=True)
    write_delta(path, replace(make_header(), tool="another"), make_records(), files={}, force=True)
    with pytest.raises(FormatError, match="another file than the one"):
        resolve_fusion(joined)
    path.unlink()
    with pytest.raises(FormatError, match="not readable"):
        resolve_fusion(joined)


@pytest.mark.parametrize("kind", [DeltaReference, LoraReference])
@pytest.mark.parametrize("path", ["../one.safetensors", "/etc/passwd", "a/b", "", ".hidden"])
def test_references_lead_nowhere_else(kind, path):
    with pytest.raises(FormatError, match="expected a plain name"):
        kind("one", path, "00" * 32)


def test_existing_output(tmp_path):
    path = write_fusion(tmp_path / "f.safetensors", make_fusion())
    with pytest.raises(DeltaweaveError, match="exists"):
        write_fusion(path, make_fusion())
    write_fusion(path, make_fusion(1), force=True)
    assert equal(read_fusion(path), make_fusion(1))


def test_what_cannot_be_a_fusion():
    generator = np.random.default_rng(0)
    fusion = make_fusion()
    with pytest.raises(FormatError, match="gate weighs 2 experts, the fusion has 3"):
        replace(fusion, gate=make_gate(generator, 2))
    with pytest.raises(FormatError, match=r"module model\.layers\.1\.\S+ lies in no block that has a gate"):
        replace(fusion, gate=make_gate(generator, 3, layers=1))
    with pytest.raises(FormatError, match="fusion of 0 experts"):
        replace(fusion, experts=())
    with pytest.raises(FormatError, match="temperature 0"):
        make_gate(generator, 2, temperature=0)
    with pytest.raises(FormatError, match="expected finite"):
        FixedGate((math.nan,))
    with pytest.raises(FormatError, match="has no modules"):
        make_lora(generator, 2, [])
    lora = make_lora(generator, 2, [Q_PROJ])
    short = replace(lora.modules[Q_PROJ], b=make_lora(generator, 2, list(SHAPES)[1:2]).modules[list(SHAPES)[1]].b)
    with pytest.raises(FormatError, match="another LoRA says"):
        replace(fusion, experts=(lora, replace(lora, modules={Q_PROJ: short}), lora))


def change(data, edit):
    outer, inner, section = split_file(data)
    edit(inner)
    return pack_file(outer, inner, section)


def matrix(inner):
    return inner["experts"][0]["modules"][Q_PROJ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h.update(version="2.0"), "format version 2.0"),
        (lambda h: h.update(format="deltaweave.delta"), "header.format"),
        (lambda h: h.update(extra=1), "unknown key 'extra'"),
        (lambda h: h.pop("gate"), "header.gate: missing"),
        (lambda h: h.update(experts=[]), "1 to 64 experts"),
        (lambda h: h.update(experts=h["experts"] * 30), "1 to 64 experts"),
        (lambda h: h["experts"].pop(), "bytes stored"),
        (lambda h: h["experts"][0].update(kind="merge"), "expected one of delta, lora, reference"),
        (lambda h: h["experts"][0].update(modules={}), "has no modules"),
        (lambda h: matrix(h).update(rank=200), "bytes stored"),
        (lambda h: matrix(h).update(rank=0), "expected an integer"),
        (lambda h: matrix(h).update(rank=2**31 - 1), "bytes stored"),
        (lambda h: matrix(h).update(shape=[64, 640]), "bytes stored"),
        (lambda h: matrix(h).update(shape=[64]), "1 dimensions, expected 2"),
        (lambda h: matrix(h).update(dtype="F32"), "has dtype BF16, expected F32"),
        (lambda h: matrix(h).update(scale="1"), "finite numbers"),
        (lambda h: matrix(h).update(scale=10**400), "finite numbers"),
        (lambda h: matrix(h).update(extra=1), "unknown key 'extra'"),
        (lambda h: matrix(h)["sha256"].update(a="0"), "64 hexadecimal digits"),
        (lambda h: matrix(h)["sha256"].pop("a"), "sha256.a: missing"),
        (lambda h: h["experts"][0]["modules"].pop(Q_PROJ), "belongs to no expert"),
        (lambda h: h["gate"].update(temperature=0), "temperature 0"),
        (lambda h: h["gate"].update(temperature=-1.5), "temperature -1.5"),
        (lambda h: h["gate"].update(hidden_size=6400), "bytes stored"),
        (lambda h: h["gate"].update(kind="magic"), "expected one of fixed, token"),
        (lambda h: h["gate"].update(blocks={}), "or there are none"),
        (lambda h: h.update(gate={"kind": "fixed", "weights": [1, 2, 3]}), "belongs to no expert"),
        (lambda h: h["method"].pop("name"), "has no name"),
    ],
)
def test_lying_headers(data, edit, message):
    bad = change(data, edit)
    with pytest.raises(FormatError, match=message) as caught:
        parse_fusion(bad)
    assert "\n" not in str(caught.value)


def test_newer_minor_versions_may_bring_keys(data):
    fusion = parse_fusion(change(data, lambda inner: inner.update(version="1.9", extra=1)))
    assert equal(fusion, parse_fusion(data))


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000, -1, -256])
def test_truncated(data, length):
    with pytest.raises(FormatError):
        parse_fusion(data[:length])


def test_gate_that_is_not_finite():
    fusion = make_fusion()
    block = fusion.gate.blocks["model.layers.1"]
    values = copy.deepcopy(block.weight.data)
    values[0, 0] = np.nan
    with pytest.raises(FormatError, match="not finite"):
        replace(block, weight=replace(block.weight, data=values))


def test_verify_finds_every_tensor(data, tmp_path):
    outer, _, section = split_file(data)
    start = len(data) - len(section)
    path = tmp_path / "f.safetensors"
    names = [name for name in outer if name != "__metadata__"]
    for name in names[::5]:
        bad = bytearray(data)
        bad[start + outer[name]["data_offsets"][0]] ^= 1
        path.write_bytes(bad)
        assert [problem.tensor for problem in verify_fusion(path)] == [name]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_header_bytes_never_crash(data, draw):
    length = 8 + int.from_bytes(data[:8], "little")
    bad = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        bad[draw.draw(st.integers(0, length - 1))] = draw.draw(st.integers(0, 255))
    try:
        parse_fusion(bytes(bad))
    except DeltaweaveError as error:
        assert "\n" not in str(error)
