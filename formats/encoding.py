# SPDX-License-Identifier: Apache-2.0
"""Records to header entries and stored tensors, and back (SPEC.md, "Records")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from deltaweave.formats.container import Container
from deltaweave.formats.errors import FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.identity import tensor_digest
from deltaweave.formats.matrix import (
    ALIGNMENT,
    BAND_ALIGNMENT,
    MAX_BANDS,
    MAX_GROUP_SIZE,
    Band,
    PackedBand,
    PackedMatrix,
    grid_entries,
    group_count,
    matrix_bytes,
    padded,
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

__all__ = ["decode_record", "encode_record", "parts_of"]

Array = NDArray[Any]
PARTS = {
    "factored": ("sigma", "v.codes", "v.grid", "u.codes", "u.grid"),
    "dense": ("codes", "grid"),
    "rows": ("indices", "values"),
    "replace": ("values",),
    "base": (),
}


def parts_of(kind: str) -> tuple[str, ...]:
    """The stored tensors of a record kind, in file order, without the parameter's name."""
    return PARTS[kind]


def encode_record(record: Record) -> tuple[dict[str, Any], dict[str, Array]]:
    """A record as its header entry and its tensors by part; tensors are one-dimensional and padded."""
    entry, arrays = _ENCODERS[type(record)](record)
    tensors = {part: _padded(array) for part, array in arrays.items()}
    entry["sha256"] = {part: tensor_digest(array.view(np.uint8).data) for part, array in tensors.items()}
    if record.quality:
        entry["quality"] = {name: float(value) for name, value in record.quality.items()}
    return entry, tensors


def decode_record(entry: Any, name: str, container: Container, where: str, *, tolerant: bool) -> Record:
    """The record of parameter `name`, as views of the container's bytes.

    Raises:
        FormatError: an entry that the specification does not allow, or tensors that do not fit it.
    """
    fields = Fields(entry, f"{where}: record {name[:200]}", tolerant=tolerant)
    kind = fields.choice("kind", PARTS)
    digests = fields.nested("sha256")
    for part in PARTS[kind]:
        digests.digest(part)
    digests.done()
    record: Record = _DECODERS[kind](fields, lambda part, dtype: _stored(container, f"{name}.{part}", dtype))
    fields.done()
    return record


# Encoding


def _padded(array: Array) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    missing = -flat.nbytes % ALIGNMENT
    return np.concatenate([flat, np.zeros(missing // flat.itemsize, flat.dtype)]) if missing else flat


def _encode_factored(record: FactoredRecord) -> tuple[dict[str, Any], dict[str, Array]]:
    if record.rank < 1:
        raise FormatError("a factored record needs at least one rank")
    entry = {
        "kind": "factored",
        "shape": list(record.shape),
        "bands": _band_entries(record.bands),
        "group_size": record.v.group_size,
        "v_group_offset": record.v.group_offset,
        "u_group_offset": record.u.group_offset,
    }
    if record.u.group_size != record.v.group_size or record.v.group_size is None:
        raise FormatError("u and v of a factored record must share a group size")
    return entry, {
        "sigma": record.sigma,
        "v.codes": _codes(record.v),
        "v.grid": _grid(record.v),
        "u.codes": _codes(record.u),
        "u.grid": _grid(record.u),
    }


def _encode_dense(record: DenseRecord) -> tuple[dict[str, Any], dict[str, Array]]:
    matrix = record.matrix
    entry = {
        "kind": "dense",
        "shape": list(record.shape),
        "bands": _band_entries([piece.band for piece in matrix.bands]),
        "group_size": matrix.group_size,
        "group_offset": matrix.group_offset,
    }
    return entry, {"codes": _codes(matrix), "grid": _grid(matrix)}


def _encode_rows(record: RowsRecord) -> tuple[dict[str, Any], dict[str, Array]]:
    entry = {
        "kind": "rows",
        "shape": list(record.shape),
        "rows": len(record.indices),
        "dtype": record.values.dtype,
    }
    return entry, {"indices": record.indices, "values": record.values.data}


def _encode_replace(record: ReplaceRecord) -> tuple[dict[str, Any], dict[str, Array]]:
    entry = {"kind": "replace", "shape": list(record.shape), "dtype": record.values.dtype}
    return entry, {"values": record.values.data}


def _encode_base(record: BaseRecord) -> tuple[dict[str, Any], dict[str, Array]]:
    return {"kind": "base", "shape": list(record.shape)}, {}


_ENCODERS: dict[type, Callable[[Any], tuple[dict[str, Any], dict[str, Array]]]] = {
    FactoredRecord: _encode_factored,
    DenseRecord: _encode_dense,
    RowsRecord: _encode_rows,
    ReplaceRecord: _encode_replace,
    BaseRecord: _encode_base,
}


def _band_entries(bands: Sequence[Band]) -> list[dict[str, Any]]:
    if not 1 <= len(bands) <= MAX_BANDS:
        raise FormatError(f"{len(bands)} bands, expected 1 to {MAX_BANDS}")
    entries = []
    for band in bands:
        entry: dict[str, Any] = {"bits": band.bits, "rank": band.rank, "grid": band.grid}
        if band.levels is not None:
            entry["levels"] = list(band.levels)
        entries.append(entry)
    return entries


def _codes(matrix: PackedMatrix) -> NDArray[np.uint8]:
    """All bands' codes, each band at a multiple of 16 bytes."""
    pieces: list[NDArray[np.uint8]] = []
    position = 0
    for piece in matrix.bands:
        gap = padded(position, BAND_ALIGNMENT) - position
        stored = np.ascontiguousarray(piece.codes).reshape(-1).view(np.uint8)
        expected = piece.band.rank * row_bytes(piece.band.bits, matrix.length)
        if stored.nbytes != expected:
            raise FormatError(
                f"band of {piece.band.bits} bits holds {stored.nbytes} bytes of codes, expected {expected}"
            )
        pieces += [np.zeros(gap, np.uint8), stored]
        position += gap + stored.nbytes
    return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)


def _grid(matrix: PackedMatrix) -> NDArray[np.float16]:
    pieces = []
    for piece in matrix.bands:
        expected = grid_entries(piece.band, matrix.length, matrix.group_size, matrix.group_offset)
        found = 0 if piece.grid is None else piece.grid.size
        if found != expected:
            raise FormatError(f"band of {piece.band.bits} bits has {found} grid values, expected {expected}")
        if piece.grid is not None:
            if not np.isfinite(piece.grid).all():
                raise FormatError(f"band of {piece.band.bits} bits has a scale or zero that is not finite")
            pieces.append(np.ascontiguousarray(piece.grid).reshape(-1))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float16)


# Decoding

Stored = Callable[[str, str], Array]


def _stored(container: Container, tensor: str, dtype: str) -> Array:
    array = container.array(tensor, dtype)
    if container.tensors[tensor].start % ALIGNMENT or array.nbytes % ALIGNMENT:
        raise FormatError(f"{container.path}: tensor {tensor[:200]} is not aligned to {ALIGNMENT} bytes")
    return array


def _decode_factored(fields: Fields, stored: Stored) -> FactoredRecord:
    out_features, in_features = fields.shape("shape", 2)
    bands = _decode_bands(fields)
    size = fields.natural("group_size", least=1, most=MAX_GROUP_SIZE)
    v_offset = fields.natural("v_group_offset", most=size - 1)
    u_offset = fields.natural("u_group_offset", most=size - 1)
    rank = sum(band.rank for band in bands)
    sigma = _exactly(fields, stored("sigma", "F32"), rank, "sigma")
    if not np.isfinite(sigma).all():
        fields.fail("sigma", "has values that are not finite")
    v = _decode_matrix(fields, bands, in_features, size, v_offset, stored, "v.")
    u = _decode_matrix(fields, bands, out_features, size, u_offset, stored, "u.")
    return FactoredRecord((out_features, in_features), u, v, sigma, fields.quality("quality"))


def _decode_dense(fields: Fields, stored: Stored) -> DenseRecord:
    rows, columns = fields.shape("shape", 2)
    bands = _decode_bands(fields)
    whole = fields.get("group_size") is None
    size = None if whole else fields.natural("group_size", least=1, most=MAX_GROUP_SIZE)
    offset = fields.natural("group_offset", most=size - 1 if size else 0)
    if len(bands) != 1 or bands[0].rank != rows or bands[0].bits == 16:
        fields.fail("bands", f"expected one band of {rows} rows and 1 to 8 bits")
    matrix = _decode_matrix(fields, bands, columns, size, offset, stored, "")
    return DenseRecord((rows, columns), matrix, fields.quality("quality"))


def _decode_rows(fields: Fields, stored: Stored) -> RowsRecord:
    rows, columns = fields.shape("shape", 2)
    count = fields.natural("rows", most=rows)
    indices = _exactly(fields, stored("indices", "I32"), count, "indices")
    values = _decode_values(fields, (count, columns), stored)
    return RowsRecord((rows, columns), indices, values, fields.quality("quality"))


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
        bands.append(Band(bits, rank, grid, levels))  # type: ignore[arg-type]  # choice() has checked it
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
    if not np.isfinite(grid).all():
        fields.fail(prefix + "grid", "has a scale or zero that is not finite")
    pieces, position, entries = [], 0, 0
    for band in bands:
        position = padded(position, BAND_ALIGNMENT)
        width = row_bytes(band.bits, length)
        rows = codes[position : position + band.rank * width].reshape(band.rank, width)
        position += band.rank * width
        used = grid_entries(band, length, size, offset)
        own = grid[entries : entries + used]
        entries += used
        pieces.append(_piece(band, rows, own, None if size is None else group_count(length, size, offset)))
    return PackedMatrix(tuple(pieces), length, size, offset)


def _piece(band: Band, rows: NDArray[np.uint8], grid: NDArray[np.float16], groups: int | None) -> PackedBand:
    if band.bits == 16:
        return PackedBand(band, rows.view(np.float16), None)
    if groups is None:
        return PackedBand(band, rows, grid)
    shape = (band.rank, groups, 2) if band.grid == "affine" else (band.rank, groups)
    return PackedBand(band, rows, grid.reshape(shape))


def _decode_values(fields: Fields, shape: tuple[int, ...], stored: Stored) -> ExactArray:
    dtype = fields.choice("dtype", NUMPY_DTYPES)
    numbers = 1
    for extent in shape:
        numbers *= extent
    values = _exactly(fields, stored("values", dtype), numbers, "values")
    return ExactArray(values.reshape(shape), dtype)  # type: ignore[arg-type]  # choice() has checked it


def _exactly(fields: Fields, array: Array, count: int, part: str) -> Array:
    """The first `count` values of a padded tensor whose length must be just what padding makes of `count`."""
    if array.nbytes != padded(count * array.itemsize):
        fields.fail(
            part,
            f"{array.nbytes} bytes stored, {count} values take {padded(count * array.itemsize)}",
        )
    return array[:count]
