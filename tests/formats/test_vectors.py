# SPDX-License-Identifier: Apache-2.0
"""The committed test vectors, SPEC.md's worked example, and the JSON schema."""

import copy
import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from deltaweave.formats import (
    Delta,
    FixedGate,
    FormatError,
    parse_fusion,
    resolve_fusion,
    verify_fusion,
    write_delta,
    write_fusion,
)
from fusions import make_fusion
from fuzz_reader import HOSTILE, places
from make_vectors import FUSION, VECTORS, contents, expected, expected_of_fusion, vector_fusion
from samples import make_header, pack_file, sample_bytes, split_file

FORMATS = Path(__file__).parents[2] / "formats"
SCHEMA = json.loads((FORMATS / "schema" / "header.schema.json").read_text())
FUSION_SCHEMA = json.loads((FORMATS / "schema" / "fusion.schema.json").read_text())
NAMES = ["example.safetensors", "kinds.safetensors"]


@pytest.fixture(scope="module")
def vectors():
    return json.loads((VECTORS / "vectors.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_writer_still_makes_these_bytes(tmp_path, vectors, name):
    records, files = contents()[name]
    path = write_delta(tmp_path / name, make_header(), records, files=files)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == vectors[name]["sha256"]
    assert path.read_bytes() == (VECTORS / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_still_gets_these_values(vectors, name):
    with Delta.open(VECTORS / name) as delta:
        assert delta.verify() == []
        found = {parameter: expected(record) for parameter, record in delta.records()}
    assert found == vectors[name]["records"]


def test_worked_example_by_hand():
    """Every number here is written out in SPEC.md, section 12, and computed from nothing else."""
    with Delta.open(VECTORS / "example.safetensors") as delta:
        container = delta._shards[0]
        codes, grid = bytes(container.raw("w.v.codes")), bytes(container.raw("w.v.grid"))
        record = delta.record("w")
        dense = delta.dequantize("w")
    assert len(codes) == len(grid) == 256
    assert codes[:18].hex() == "0f2a" + "00" * 14 + "e401"
    assert not any(codes[18:])
    assert grid[:16].hex() == "00340044003800430" + "03c003e00400000"
    u, sigma, v = record.factors()
    assert v.tolist() == [[0.75, -0.75, -1, 0.25, -0.75], [-1.5, -0.5, 0.5, 1.5, 2]]
    assert (u.tolist(), sigma.tolist()) == ([[1, -1], [2, -1]], [2, 0.5])
    assert dense.tolist() == [[0, -2, -1.5, 2, 0.5], [-0.75, 1.75, 1.75, -1.25, 0.5]]


def test_spec_prints_the_bytes_of_the_example():
    text = (FORMATS / "SPEC.md").read_text()
    with Delta.open(VECTORS / "example.safetensors") as delta:
        grid = bytes(delta._shards[0].raw("w.v.grid"))[:16].hex(" ").upper().split()
    line = next(line for line in text.splitlines() if line.startswith("w.v.grid"))
    assert line.split("...")[0].split()[1:17] == grid


def test_headers_meet_the_schema(tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for name in NAMES:
        _, inner, _ = split_file((VECTORS / name).read_bytes())
        jsonschema.validate(inner, SCHEMA)


def test_the_fusion_vector(tmp_path, vectors):
    fusion = vector_fusion()
    assert write_fusion(tmp_path / FUSION, fusion).read_bytes() == (VECTORS / FUSION).read_bytes()
    assert hashlib.sha256((VECTORS / FUSION).read_bytes()).hexdigest() == vectors[FUSION]["sha256"]
    assert verify_fusion(VECTORS / FUSION) == []
    assert expected_of_fusion(resolve_fusion(VECTORS / FUSION)) == vectors[FUSION]["tensors"]


def test_fusion_headers_meet_their_schema(tmp_path):
    jsonschema.Draft202012Validator.check_schema(FUSION_SCHEMA)
    fixed = write_fusion(tmp_path / "fixed.safetensors", make_fusion(gate=FixedGate((0.5, 0, 1))))
    for path in (VECTORS / FUSION, fixed):
        jsonschema.validate(split_file(path.read_bytes())[1], FUSION_SCHEMA)


def test_the_fusion_schema_and_reader_require_the_same_keys():
    """Whatever key is removed from the header, both refuse it, and neither takes an unknown one."""
    outer, inner, section = split_file((VECTORS / FUSION).read_bytes())
    validator = jsonschema.Draft202012Validator(FUSION_SCHEMA)
    checked = 0
    for path in places(inner):
        if not path or not isinstance(path[-1], str) or path[0] in ("training", "method"):
            continue
        if path[-2:-1] in (("tensors",), ("tied",), ("modules",), ("blocks",)):
            continue  # free content: a reader misses the tensors' owner, a schema cannot
        damaged = copy.deepcopy(inner)
        owner = damaged
        for key in path[:-1]:
            owner = owner[key]
        if isinstance(owner, dict):
            del owner[path[-1]]
            assert not validator.is_valid(damaged) and not readable_fusion(pack_file(outer, damaged, section)), path
            owner["unknown"] = 1
            assert not validator.is_valid(damaged), path
            checked += 1
    assert checked > 100


def readable_fusion(data):
    try:
        parse_fusion(data)
    except FormatError:
        return False
    return True


def header():
    return split_file((VECTORS / "kinds.safetensors").read_bytes())


def test_schema_and_reader_require_the_same_keys(tmp_path):
    """Whatever key is removed from a header, both refuse it or both accept it."""
    outer, inner, section = header()
    validator = jsonschema.Draft202012Validator(SCHEMA)
    checked = 0
    for path in places(inner):
        if (
            not path
            or not isinstance(path[-1], str)
            or (path[0] in ("method", "calibration", "records") and len(path) < 3)
        ):
            continue
        if path[0] in ("calibration", "method") or path[-2:-1] in (("tensors",), ("tied",), ("files",)):
            continue  # free content
        damaged = copy.deepcopy(inner)
        owner = damaged
        for key in path[:-1]:
            owner = owner[key]
        del owner[path[-1]]
        assert validator.is_valid(damaged) == readable(pack_file(outer, damaged, section)), path
        checked += 1
    assert checked > 80


def test_what_the_reader_accepts_the_schema_accepts():
    outer, inner, section = header()
    validator = jsonschema.Draft202012Validator(SCHEMA)
    generator = np.random.default_rng(0)
    candidates = [path for path in places(inner) if path]
    accepted = 0
    for _ in range(1500):
        damaged = copy.deepcopy(inner)
        path = candidates[generator.integers(len(candidates))]
        owner = damaged
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = HOSTILE[generator.integers(len(HOSTILE))]
        try:
            data = pack_file(outer, damaged, section)
        except UnicodeEncodeError:
            continue
        if readable(data):
            accepted += 1
            assert validator.is_valid(damaged), path
    assert accepted > 20


def readable(data):
    try:
        delta = Delta.from_bytes(data)
        for name in delta.names:
            delta.record(name)
    except FormatError:
        return False
    return True


def test_samples_are_small(tmp_path):
    assert len(sample_bytes(tmp_path)) < 65536
