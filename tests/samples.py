# SPDX-License-Identifier: Apache-2.0
"""Small deltas with every kind of record, made from a seed; shared by the tests, the fuzzer and the test vectors."""

from __future__ import annotations

import json
import struct

import numpy as np
from deltaweave.formats import (
    Architecture,
    Band,
    BaseIdentity,
    BaseRecord,
    DenseRecord,
    ExactArray,
    FactoredRecord,
    Header,
    PackedBand,
    PackedMatrix,
    ReplaceRecord,
    RowsRecord,
    TensorIdentity,
    TunedInfo,
    pack_codes,
    root_digest,
    write_delta,
)

__all__ = ["make_header", "make_matrix", "make_records", "pack_file", "sample_bytes", "split_file"]


def make_matrix(generator, bands, length, group_size, group_offset=0):
    pieces = []
    for band in bands:
        if band.bits == 16:
            pieces.append(PackedBand(band, generator.standard_normal((band.rank, length)).astype(np.float16), None))
            continue
        codes = generator.integers(0, 1 << band.bits, (band.rank, length)).astype(np.uint8)
        groups = -(-(length + group_offset) // group_size) if group_size else 1
        shape = (band.rank, groups) if group_size else (1,)
        if band.grid == "affine":
            shape = (*shape, 2) if group_size else (2,)
        grid = generator.uniform(0.05, 2, shape).astype(np.float16)
        pieces.append(PackedBand(band, pack_codes(codes, band.bits), grid))
    return PackedMatrix(tuple(pieces), length, group_size, group_offset)


def make_factored(generator, shape, bands, group_size):
    u, v = (make_matrix(generator, bands, length, group_size) for length in shape)
    sigma = np.sort(generator.uniform(0.1, 3, u.rows).astype(np.float32))[::-1].copy()
    return FactoredRecord(shape, u, v, sigma, {"weight_error": 0.25})


def exact(generator, shape, dtype):
    values = generator.standard_normal(shape).astype(np.float32)
    if dtype == "BF16":
        return ExactArray((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
    return ExactArray(values.astype({"F32": np.float32, "F16": np.float16}[dtype]), dtype)


def make_records(seed=0):
    """One record of every kind, every bit width and every grid."""
    generator = np.random.default_rng(seed)
    levels = (-1.5, -0.5, 0.5, 1.5)
    triple = [Band(8, 2), Band(3, 3), Band(2, 5)]
    mixed = [Band(16, 1, "none"), Band(4, 2), Band(2, 3, "codebook", levels), Band(1, 2)]
    dense = make_matrix(generator, [Band(8, 9)], 24, 16)
    signs = make_matrix(generator, [Band(1, 20)], 30, None)
    return {
        "model.layers.0.self_attn.q_proj.weight": make_factored(generator, (40, 24), triple, 16),
        "model.layers.0.mlp.up_proj.weight": make_factored(generator, (33, 24), mixed, 8),
        "model.layers.0.mlp.down_proj.weight": DenseRecord((20, 30), signs, {"weight_error": 0.5}),
        "model.embed_tokens.weight": DenseRecord((9, 24), dense),
        "lm_head.weight": RowsRecord((9, 24), np.array([1, 4, 8], np.int32), exact(generator, (3, 24), "BF16")),
        "model.norm.weight": ReplaceRecord(exact(generator, (24,), "F16")),
        "model.layers.0.input_layernorm.weight": ReplaceRecord(exact(generator, (24,), "F32")),
        "model.layers.0.self_attn.q_proj.bias": BaseRecord((40,)),
    }


def make_header():
    tensors = {
        "model.norm.weight": TensorIdentity("ab" * 32, "BF16", (24,)),
        "model.embed_tokens.weight": TensorIdentity("cd" * 32, "BF16", (8, 24)),
    }
    base = BaseIdentity("base", None, "apache-2.0", root_digest(tensors), "ef" * 32, tensors)
    tuned = TunedInfo("tuned", "1234", None, "BF16", 9000)
    method = {"name": "delta-come", "ratio": 0.0625, "seed": 0}
    calibration = {"source": "default", "samples": 128, "sequence_length": 2048}
    architecture = Architecture("llama", {"other_head.weight": "lm_head.weight"})
    return Header("deltaweave 0.1.0", base, tuned, architecture, method, calibration)


FILES = {"tokenizer_config.json": b'{"model_max_length": 64}', "chat_template.jinja": b"{{ messages }}" * 30}


def sample_bytes(folder, seed=0):
    """A whole file's bytes."""
    path = folder / f"sample-{seed}.safetensors"
    write_delta(path, make_header(), make_records(seed), files=FILES, force=True)
    return path.read_bytes()


def split_file(data):
    """(safetensors header, deltaweave header, data section), the headers parsed."""
    (length,) = struct.unpack("<Q", data[:8])
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["deltaweave"])
    return outer, inner, data[8 + length :]


def pack_file(outer, inner, section):
    """The file again; `inner` may be text already, or None to leave `outer` as it is."""
    text = inner if isinstance(inner, str) else json.dumps(inner)
    if "__metadata__" in outer and isinstance(outer["__metadata__"], dict) and inner is not None:
        version = inner.get("version", "") if isinstance(inner, dict) else outer["__metadata__"]["version"]
        outer = {**outer, "__metadata__": {**outer["__metadata__"], "deltaweave": text, "version": version}}
    encoded = json.dumps(outer).encode()
    encoded += b" " * (-(8 + len(encoded)) % 256)
    return struct.pack("<Q", len(encoded)) + encoded + section
