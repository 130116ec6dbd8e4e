# SPDX-License-Identifier: Apache-2.0
"""Records to header entries and stored tensors, and back (SPEC.md, "Records")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from deltaweave.formats.container import Container, StoredTensor
from deltaweave.formats.errors import FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.layout import ALIGNMENT, BAND_ALIGNMENT, MAX_BANDS, MAX_GROUP_SIZE, padded
from deltaweave.formats.matrix import (
    Band,
    PackedBand,
    PackedMatrix,
    grid_shape,
    matrix_bytes,
)
from deltaweave.formats.packing import CODE_BITS, row_bytes
from deltaweave.formats.records import (
    NUMPY_DTYPES,
    BaseRecord,
    DenseRecord,
    ExactArray,
    FactoredRecord,
    Record,
    ReplaceRecord,
    RowsRecord,
)
from numpy.typing import NDArray

__all__ = ["RECORD_KINDS", "decode_record", "encode_record", "exactly", "parts_of", "stored_array"]

Array = NDArray[Any]
PARTS = {
    "factored": ("sigma", "v.codes", "v.grid", "u.codes", "u.grid"),
    "dense": ("codes", "grid"),
    "rows": ("indices", "values"),
    "replace": ("values",),
    "base": (),
}


RECORD_KINDS = tuple(PARTS)


def parts_of(kind: str) -> tuple[str, ...]:
    """The stored tensors of a record kind, in file order, without the parameter's name."""
    return PARTS[kind]


def encode_record(record: Record) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """A record as its header entry and its tensors by part, which are views of the record's arrays."""
    entry, tensors = _ENCODERS[type(record)](record)
    entry["sha256"] = {part: tensor.digest() for part, tensor in tensors.items()}
    if record.quality:
        entry["quality"] = {name: float(value) for name, value in record.quality.items()}
    return entry, tensors


def decode_record(entry: Any, name: str, container: Container, where: str, *, tolerant: bool) -> Record:
    """The record of parameter `name`, as views of the container's bytes.

    Raises:
        FormatError: an entry that the specification does not allow, or tensors that do not fit it.
    """
    fields = Fields(entry, f"{where}: record {name}", tolerant=tolerant)
    kind = fields.choice("kind", PARTS)
    digests = fields.nested("sha256")
    for part in PARTS[kind]:
        digests.digest(part)
    digests.done()
    record: Record = _DECODERS[kind](fields, lambda part, dtype: stored_array(container, f"{name}.{part}", dtype))
    fields.done()
    return record


# Encoding

Encoded = tuple[dict[str, Any], dict[str, StoredTensor]]


def _encode_factored(record: FactoredRecord) -> Encoded:
    entry = {
        "kind": "factored",
        "shape": list(record.shape),
        "bands": _band_entries(record.bands),
        "group_size": record.v.group_size,
        "v_group_offset": record.v.group_offset,
        "u_group_offset": record.u.group_offset,
    }
    return entry, {
        "sigma": StoredTensor.of("F32", [record.sigma]),
        "v.codes": _codes(record.v),
        "v.grid": _grid(record.v),
        "u.codes": _codes(record.u),
        "u.grid": _grid(record.u),
    }


def _encode_dense(record: DenseRecord) -> Encoded:
    matrix = record.matrix
    entry = {
        "kind": "dense",
        "shape": list(record.shape),
        "bands": _band_entries([piece.band for piece in matrix.bands]),
        "group_size": matrix.group_size,
        "group_offset": matrix.group_offset,
    }
    return entry, {"codes": _codes(matrix), "grid": _grid(matrix)}


def _encode_rows(record: RowsRecord) -> Encoded:
    entry = {
        "kind": "rows",
        "shape": list(record.shape),
        "rows": len(record.indices),
        "dtype": record.values.dtype,
    }
    return entry, {"indices": StoredTensor.of("I32", [record.indices]), "values": _values(record.values)}


def _encode_replace(record: ReplaceRecord) -> Encoded:
    entry = {"kind": "replace", "shape": list(record.shape), "dtype": record.values.dtype}
    return entry, {"values": _values(record.values)}


def _encode_base(record: BaseRecord) -> Encoded:
    return {"kind": "base", "shape": list(record.shape)}, {}


_ENCODERS: dict[type, Callable[[Any], Encoded]] = {
    FactoredRecord: _encode_factored,
    DenseRecord: _encode_dense,
    RowsRecord: _encode_rows,
    ReplaceRecord: _encode_replace,
    BaseRecord: _encode_base,
}


def _codes(matrix: PackedMatrix) -> StoredTensor:
    return StoredTensor.of("U8", [piece.codes for piece in matrix.bands], BAND_ALIGNMENT)


def _grid(matrix: PackedMatrix) -> StoredTensor:
    return StoredTensor.of("F16", [piece.grid for piece in matrix.bands if piece.grid is not None])


def _values(values: ExactArray) -> StoredTensor:
    return StoredTensor.of(values.dtype, [values.data])


def _band_entries(bands: Sequence[Band]) -> list[dict[str, Any]]:
    entries = []
    for band in bands:
        entry: dict[str, Any] = {"bits": band.bits, "rank": band.rank, "grid": band.grid}
        if band.levels is not None:
            entry["levels"] = list(band.levels)
        entries.append(entry)
    return entries


# Decoding

Stored = Callable[[str, str], Array]


def stored_array(container: Container, tensor: str, dtype: str) -> Array:
    """A stored tensor, padding included.

    Raises:
        FormatError: it is missing, of another dtype, or not aligned.
    """
    array = container.array(tensor, dtype)
    if container.tensors[tensor].start % ALIGNMENT or array.nbytes % ALIGNMENT:
        raise FormatError(f"{container.path}: tensor {tensor[:200]} is not aligned to {ALIGNMENT} bytes")
    return array


def _decode_factored(fields: Fields, stored: Stored) -> FactoredRecord:
    out_features, in_features = shape = fields.matrix_shape("shape")
    bands = _decode_bands(fields)
    size = fields.natural("group_size", least=1, most=MAX_GROUP_SIZE)
    v_offset = fields.natural("v_group_offset", most=size - 1)
    u_offset = fields.natural("u_group_offset", most=size - 1)
    sigma = exactly(fields, stored("sigma", "F32"), sum(band.rank for band in bands), "sigma")
    v = _decode_matrix(fields, bands, in_features, size, v_offset, stored, "v.")
    u = _decode_matrix(fields, bands, out_features, size, u_offset, stored, "u.")
    return fields.build(FactoredRecord, shape, u, v, sigma, fields.quality("quality"))


def _decode_dense(fields: Fields, stored: Stored) -> DenseRecord:
    shape = fields.matrix_shape("shape")
    bands = _decode_bands(fields)
    whole = fields.get("group_size") is None
    size = None if whole else fields.natural("group_size", least=1, most=MAX_GROUP_SIZE)
    offset = fields.natural("group_offset", most=size - 1 if size else 0)
    matrix = _decode_matrix(fields, bands, shape[1], size, offset, stored, "")
    return fields.build(DenseRecord, shape, matrix, fields.quality("quality"))


def _decode_rows(fields: Fields, stored: Stored) -> RowsRecord:
    rows, columns = shape = fields.matrix_shape("shape")
    count = fields.natural("rows", most=rows)
    indices = exactly(fields, stored("indices", "I32"), count, "indices")
    values = _decode_values(fields, (count, columns), stored)
    return fields.build(RowsRecord, shape, indices, values, fields.quality("quality"))


def _decode_replace(fields: Fields, stored: Stored) -> ReplaceRecord:
    return ReplaceRecord(_decode_values(fields, fields.shape("shape"), stored), fields.quality("quality"))


def _decode_base(fields: Fields, _: Stored) -> BaseRecord:
    return BaseRecord(fields.shape("shape"), fields.quality("quality"))


_DECODERS: Mapping[str, Callable[[Fields, Stored], Record]] = {
    "factored": _decode_factored,
    "dense": _decode_dense,
    "rows": _decode_rows,
    "replace": _decode_replace,
    "base": _decode_base,
}


def _decode_bands(fields: Fields) -> list[Band]:
    entries = fields.get("bands")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_BANDS:
        fields.fail("bands", f"expected a list of 1 to {MAX_BANDS} bands")
    bands = []
    for index, entry in enumerate(entries):
        band = Fields(entry, f"{fields.where}.bands[{index}]", tolerant=fields.tolerant)
        bits = band.natural("bits", least=1, most=16)
        if bits not in (*CODE_BITS, 16):
            band.fail("bits", f"{bits}, expected one of {', '.join(map(str, (*CODE_BITS, 16)))}")
        rank = band.natural("rank", least=1)
        grid = band.choice("grid", ("affine", "codebook", "none"))
        levels = band.numbers("levels") if grid == "codebook" else None
        band.done()
        bands.append(band.build(Band, bits, rank, grid, levels))
    return bands


def _decode_matrix(
    fields: Fields,
    bands: list[Band],
    length: int,
    size: int | None,
    offset: int,
    stored: Stored,
    prefix: str,
) -> PackedMatrix:
    """Views of one codes tensor and one grid tensor; their lengths must be exactly what bands and length imply."""
    count = matrix_bytes(bands, length, size, offset)
    codes, grid = stored(prefix + "codes", "U8"), stored(prefix + "grid", "F16")
    if codes.nbytes + grid.nbytes != count.total or grid.nbytes != padded(count.grids):
        fields.fail(
            prefix + "codes",
            f"{codes.nbytes} bytes of codes and {grid.nbytes} of grids, expected {count.total} together",
        )
    pieces, position, entries = [], 0, 0
    for band in bands:
        width = row_bytes(band.bits, length)
        position = padded(position, BAND_ALIGNMENT)
        rows = codes[position : position + band.rank * width].reshape(band.rank, width)
        position += band.rank * width
        own = None
        if (shape := grid_shape(band, length, size, offset)) is not None:
            own = grid[entries : entries + math.prod(shape)].reshape(shape)
            entries += own.size
        items = rows.view(np.float16) if band.bits == 16 else rows
        pieces.append(fields.build(PackedBand, band, items, own, part=prefix + "grid"))
    return fields.build(PackedMatrix, tuple(pieces), length, size, offset)


def _decode_values(fields: Fields, shape: tuple[int, ...], stored: Stored) -> ExactArray:
    dtype = fields.choice("dtype", NUMPY_DTYPES)
    values = exactly(fields, stored("values", dtype), math.prod(shape), "values")
    return fields.build(ExactArray, values.reshape(shape), dtype)


def exactly(fields: Fields, array: Array, count: int, part: str) -> Array:
    """The first `count` values of a padded tensor whose length must be just what padding makes of `count`."""
    if array.nbytes != padded(count * array.itemsize):
        fields.fail(
            part,
            f"{array.nbytes} bytes stored, {count} values take {padded(count * array.itemsize)}",
        )
    return array[:count]
