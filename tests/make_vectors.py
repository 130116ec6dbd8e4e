# SPDX-License-Identifier: Apache-2.0
"""Makes the committed test vectors: `python tests/make_vectors.py`.

`example.safetensors` is SPEC.md's worked example; `kinds.safetensors` has every kind of record, bit width and grid;
`fusion.safetensors` has LoRAs of several ranks and dtypes, a reference to a delta, and a token gate.
`vectors.json` holds their digests and, for each record, digests of what a reader must get out of it: little-endian
float32 bytes of U, V, sigma, or of the exact values.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from deltaweave.formats import (
    Band,
    Delta,
    DeltaReference,
    DenseRecord,
    FactoredRecord,
    Fusion,
    PackedBand,
    PackedMatrix,
    pack_codes,
    write_delta,
    write_fusion,
)
from fusions import make_fusion, make_gate
from samples import FILES, make_header, make_records

VECTORS = Path(__file__).parents[1] / "formats" / "vectors"
FUSION = "fusion.safetensors"


def example_record() -> FactoredRecord:
    """SPEC.md, section 12."""
    bands = (Band(3, 1), Band(2, 1))

    def matrix(length, codes, grids):
        pieces = (
            PackedBand(band, pack_codes(np.array([row], np.uint8), band.bits), np.array([grid], np.float16))
            for band, row, grid in zip(bands, codes, grids, strict=True)
        )
        return PackedMatrix(tuple(pieces), length, 4)

    v = matrix(5, ([7, 1, 0, 5, 2], [0, 1, 2, 3, 1]), ([[0.25, 4], [0.5, 3.5]], [[1, 1.5], [2, 0]]))
    u = matrix(2, ([6, 2], [3, 0]), ([[0.5, 4]], [[1, 1]]))
    return FactoredRecord((2, 5), u, v, np.array([2, 0.5], np.float32))


def contents() -> dict[str, tuple[dict, dict]]:
    """File name to (records, carried files)."""
    return {
        "example.safetensors": ({"w": example_record()}, {}),
        "kinds.safetensors": (make_records(), FILES),
    }


def expected(record) -> dict[str, str]:
    """Digests of what a reader must get out of a record."""
    if isinstance(record, FactoredRecord):
        values = dict(zip(("u", "sigma", "v"), record.factors(), strict=True))
    elif isinstance(record, DenseRecord):
        values = {"values": record.dequantize()}
    elif hasattr(record, "values"):
        values = {"values": record.values.to_float32()}
    else:
        values = {}
    return {name: digest(value) for name, value in values.items()}


def vector_fusion() -> Fusion:
    """Three LoRAs and `kinds.safetensors` as the fourth expert."""
    fusion = make_fusion()
    with Delta.open(VECTORS / "kinds.safetensors") as delta:
        reference = DeltaReference("kinds", "kinds.safetensors", delta.header_sha256)
    gate = make_gate(np.random.default_rng(1), 4)
    return replace(fusion, experts=(*fusion.experts, reference), gate=gate)


def expected_of_fusion(fusion: Fusion) -> dict[str, str]:
    """Digests of what a reader must get out of its tensors, as for records."""
    arrays = {
        f"experts/{index}/{name}.{part}": getattr(matrix, part)
        for index, lora in enumerate(fusion.loras)
        for name, matrix in lora.modules.items()
        for part in ("a", "b")
    }
    for name, block in fusion.gate.blocks.items():
        arrays |= {f"gate/{name}.weight": block.weight, f"gate/{name}.bias": block.bias}
    return {name: digest(array.to_float32()) for name, array in arrays.items()}


def digest(values) -> str:
    """Of little-endian float32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def main() -> None:
    VECTORS.mkdir(exist_ok=True)
    vectors = {}
    for name, (records, files) in contents().items():
        write_delta(VECTORS / name, make_header(), records, files=files, force=True)
        vectors[name] = {
            "sha256": hashlib.sha256((VECTORS / name).read_bytes()).hexdigest(),
            "records": {parameter: expected(record) for parameter, record in records.items()},
        }
    fusion = vector_fusion()
    write_fusion(VECTORS / FUSION, fusion, force=True)
    vectors[FUSION] = {
        "sha256": hashlib.sha256((VECTORS / FUSION).read_bytes()).hexdigest(),
        "tensors": expected_of_fusion(fusion),
    }
    (VECTORS / "vectors.json").write_text(json.dumps(vectors, indent=2) + "\n")


if __name__ == "__main__":
    main()
