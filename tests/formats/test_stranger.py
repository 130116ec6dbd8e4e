# SPDX-License-Identifier: Apache-2.0
"""A reader written from SPEC.md alone, in plain Python: what it gets out of the vectors is what ours gets.

`read` to `exact_of` know nothing of deltaweave: slow, in the words of the document, and without shared code.
"""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from deltaweave.formats import Delta, DenseRecord, FactoredRecord, ReplaceRecord, RowsRecord

VECTORS = Path(__file__).parents[2] / "formats" / "vectors"


def read(path):
    """Sections 1 and 2: (header, tensor name to bytes)."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    assert (8 + size) % 256 == 0
    outer = json.loads(content[8 : 8 + size])
    metadata, data = outer.pop("__metadata__"), content[8 + size :]
    tensors = {name: data[slice(*entry["data_offsets"])] for name, entry in outer.items()}
    assert sum(map(len, tensors.values())) == len(data)
    return json.loads(metadata["deltaweave"]), tensors


def float_of(value):
    """A number rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def matrix_of(record, codes, grid, length, group_offset):
    """Section 5, one value at a time."""
    size = record["group_size"]
    position, entry, matrix = 0, 0, []
    for band in record["bands"]:
        position = -(-position // 16) * 16
        row_bytes = -(-band["bits"] * length // 8)
        groups = -(-(length + group_offset) // size) if size else 1
        wide = {"affine": 2, "codebook": 1, "none": 0}[band["grid"]]
        for row in range(band["rank"]):
            stream = codes[position : position + row_bytes]
            position += row_bytes
            first = entry + (row * groups * wide if size else 0)
            matrix.append(
                [value_of(band, stream, j, grid, first + wide * ((j + group_offset) // size if size else 0))
                 for j in range(length)]
            )  # fmt: skip
        entry += wide * groups * (band["rank"] if size else 1)
    return matrix


def value_of(band, stream, j, grid, entry):
    bits = band["bits"]
    if bits == 16:
        return struct.unpack_from("<e", stream, 2 * j)[0]
    code = sum((stream[k // 8] >> (k % 8) & 1) << (k - bits * j) for k in range(bits * j, bits * j + bits))
    (scale,) = struct.unpack_from("<e", grid, 2 * entry)
    if band["grid"] == "codebook":
        return float_of(scale * float_of(band["levels"][code]))
    (zero,) = struct.unpack_from("<e", grid, 2 * entry + 2)
    return float_of(scale * float_of(code - zero))  # exact in float64, so rounded once


def exact_of(record, raw, count):
    """Sections 4.3 and 4.4."""
    if record["dtype"] == "BF16":
        return [struct.unpack("<f", b"\0\0" + raw[2 * i : 2 * i + 2])[0] for i in range(count)]
    return list(struct.unpack_from(f"<{count}{'f' if record['dtype'] == 'F32' else 'e'}", raw))


@pytest.mark.parametrize("name", ["example.safetensors", "kinds.safetensors"])
def test_a_stranger_reads_the_same(name):
    header, tensors = read(VECTORS / name)
    with Delta.open(VECTORS / name) as delta:
        assert list(header["records"]) == delta.names
        for parameter, entry in header["records"].items():
            ours = delta.record(parameter)
            part = {key: tensors[f"{parameter}.{key}"] for key in entry["sha256"]}
            assert {key: hashlib.sha256(raw).hexdigest() for key, raw in part.items()} == entry["sha256"]
            if isinstance(ours, FactoredRecord):
                out_features, in_features = entry["shape"]
                u, sigma, v = ours.factors()
                theirs_u = matrix_of(entry, part["u.codes"], part["u.grid"], out_features, entry["u_group_offset"])
                theirs_v = matrix_of(entry, part["v.codes"], part["v.grid"], in_features, entry["v_group_offset"])
                assert (theirs_u, theirs_v) == (u.tolist(), v.tolist())
                assert list(struct.unpack_from(f"<{len(sigma)}f", part["sigma"])) == sigma.tolist()
            elif isinstance(ours, DenseRecord):
                theirs = matrix_of(entry, part["codes"], part["grid"], entry["shape"][1], entry["group_offset"])
                assert theirs == ours.dequantize().tolist()
            elif isinstance(ours, RowsRecord):
                assert list(struct.unpack_from(f"<{entry['rows']}i", part["indices"])) == ours.indices.tolist()
                count = entry["rows"] * entry["shape"][1]
                assert exact_of(entry, part["values"], count) == ours.values.to_float32().reshape(-1).tolist()
            elif isinstance(ours, ReplaceRecord):
                count = int(np.prod(entry["shape"]))
                assert exact_of(entry, part["values"], count) == ours.values.to_float32().reshape(-1).tolist()
        for file, entry in header["files"].items():
            assert tensors[f"files/{file}"][: entry["bytes"]] == delta.file(file)
