# SPDX-License-Identifier: Apache-2.0
"""Strict reading and streaming writing of safetensors files; the reader trusts nothing that it has not checked."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from deltaweave.formats.errors import DeltaweaveError, FormatError
from deltaweave.formats.layout import ALIGNMENT, MAX_DIMENSIONS, MAX_HEADER, padded
from numpy.typing import NDArray

__all__ = [
    "ITEM_BITS",
    "Container",
    "StoredTensor",
    "TensorEntry",
    "parse_json",
    "write_atomically",
    "write_container",
    "write_pieces",
]

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
ARRAY_DTYPES = {"U8": "<u1", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "I32": "<i4"}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        dtype: the format's name, such as `BF16`.
        shape: its extents.
        start: first byte, from the file's beginning.
        stop: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Container:
    """A safetensors file: its string metadata and its tensors as views of the mapped bytes."""

    def __init__(self, data: memoryview, path: Path | str = "bytes") -> None:
        """Parses and checks the header of `data`; `path` is what errors call it.

        Raises:
            FormatError: anything that is not a valid safetensors file without holes.
        """
        self.path, self._data = path, data
        self.metadata, self.tensors = _parse(data, path)

    @classmethod
    def open(cls, path: str | Path) -> Container:
        """Maps a file.

        Raises:
            FormatError: not a readable, valid file.
        """
        try:
            with Path(path).open("rb") as file:
                data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = error.strerror if isinstance(error, OSError) else "empty"
            raise FormatError(f"{path}: not readable ({reason})") from error
        return cls(memoryview(data), path)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes.

        Raises:
            FormatError: no such tensor.
        """
        entry = self._entry(name)
        return self._data[entry.start : entry.stop]

    def array(self, name: str, dtype: str) -> NDArray[Any]:
        """A one-dimensional view of a tensor that must have `dtype` (U8, F16, BF16 as uint16, F32, I32)."""
        entry = self._entry(name)
        if entry.dtype != dtype:
            raise FormatError(f"{self.path}: tensor {name} has dtype {entry.dtype}, expected {dtype}")
        if len(entry.shape) != 1:
            raise FormatError(f"{self.path}: tensor {name} has {len(entry.shape)} dimensions, expected 1")
        return np.frombuffer(self._data[entry.start : entry.stop], dtype=ARRAY_DTYPES[dtype])

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise FormatError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]


def parse_json(text: bytes, where: str) -> Any:
    """JSON without duplicate keys, numbers that are not finite, or nesting deep enough to exhaust the stack.

    Raises:
        FormatError: starting with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("duplicate key")
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(literal: str) -> float:
        number = float(literal)
        if not math.isfinite(number):
            raise ValueError(f"number {literal[:40]} is out of range")
        return number

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({str(error).splitlines()[0][:120]})") from error


def _parse(data: memoryview, path: Path | str) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    if len(data) < 8:
        raise FormatError(f"{path}: {len(data)} bytes, too short for a header")
    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data):
        what = "not a safetensors file, or only a part of one"
        raise FormatError(f"{path}: {what}: header of {length} bytes in a file of {len(data)}")
    if length > MAX_HEADER:
        raise FormatError(f"{path}: header of {length} bytes, expected at most {MAX_HEADER}")
    header = parse_json(bytes(data[8 : 8 + length]), f"{path}: header")
    if not isinstance(header, dict):
        raise FormatError(f"{path}: header holds {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    start = 8 + length
    tensors = {name: _parse_entry(entry, name, start, len(data), path) for name, entry in header.items()}
    _require_no_holes(tensors, start, len(data), path)
    return metadata, tensors


def _parse_entry(entry: Any, name: str, start: int, size: int, path: Path | str) -> TensorEntry:
    def fail(problem: str) -> NoReturn:
        raise FormatError(f"{path}: tensor {name[:200]}: {problem}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fail("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        fail(f"unknown dtype {str(dtype)[:40]}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        fail(f"shape must be a list of at most {MAX_DIMENSIONS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        fail("data_offsets must be two natural numbers")
    begin, end = offsets
    if not begin <= end <= size - start:
        fail(f"bytes [{begin}, {end}) lie outside the data section of {size - start} bytes")
    numbers = 1
    for extent in shape:
        numbers *= extent
        if numbers > 8 * size:
            fail("shape holds more values than the file has bits")
    if numbers * ITEM_BITS[dtype] != 8 * (end - begin):
        fail(f"shape {shape} of {dtype} does not take {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _require_no_holes(tensors: Mapping[str, TensorEntry], start: int, size: int, path: Path | str) -> None:
    position = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            problem = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name[:200]} {problem}")
        position = entry.stop
    if position != size:
        raise FormatError(f"{path}: {size - position} bytes behind the last tensor")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor about to be written: one-dimensional, padded, in pieces that are never copied together.

    Attributes:
        dtype: the format's name.
        pieces: uint8 views of the arrays, and the zeros between and behind them.
    """

    dtype: str
    pieces: tuple[NDArray[np.uint8], ...]

    @classmethod
    def of(cls, dtype: str, arrays: Iterable[NDArray[Any]], alignment: int = 1) -> StoredTensor:
        """Arrays one behind the other, each at a multiple of `alignment`; zeros fill up to a multiple of 256 bytes."""
        pieces: list[NDArray[np.uint8]] = []
        position = 0
        for array in arrays:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            gap = padded(position, alignment) - position
            pieces += [np.zeros(gap, np.uint8), raw]
            position += gap + raw.nbytes
        pieces.append(np.zeros(padded(position) - position, np.uint8))
        return cls(dtype, tuple(piece for piece in pieces if piece.nbytes))

    @property
    def nbytes(self) -> int:
        """Stored bytes, padding included."""
        return sum(piece.nbytes for piece in self.pieces)

    def digest(self) -> str:
        """SHA-256 of the stored bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(piece.data)
        return digest.hexdigest()


def write_container(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file in one pass; data begins at a multiple of 256 bytes.

    Args:
        path: where; an existing file is replaced at the end, or kept if anything fails.
        tensors: written in this order; mapped arrays are streamed.
        metadata: string to string.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        items = 8 * tensor.nbytes // ITEM_BITS[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": [items], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise FormatError(f"{path}: header of {len(text)} bytes, expected at most {MAX_HEADER}")
    pieces: Iterator[Any] = (piece.data for tensor in tensors.values() for piece in tensor.pieces)
    write_atomically(path, lambda write: write_pieces(write, [len(text).to_bytes(8, "little"), text], pieces))


def write_pieces(write: Callable[[Any], object], head: list[bytes], pieces: Iterable[Any]) -> None:
    """Hands all bytes to `write` in turn."""
    for piece in head:
        write(piece)
    for piece in pieces:
        write(piece)


def write_atomically(path: Path, fill: Callable[[Callable[[Any], object]], None]) -> None:
    """Fills a temporary file beside `path`, makes it durable, and renames it; a failure leaves no trace.

    Args:
        path: the file that appears whole or not at all.
        fill: called with a function that writes bytes.

    Raises:
        DeltaweaveError: naming the file and what the system said.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file.write)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DeltaweaveError(f"{path}: cannot be written ({error.strerror})") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
