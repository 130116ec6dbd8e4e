# SPDX-License-Identifier: Apache-2.0
"""Tenants in host memory, and their way into an arena: written in place on the CPU, uploaded and repacked on a GPU."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from deltaweave.formats import DenseRecord, FactoredRecord, PackedMatrix
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.pytorch.payload import HostRow
from deltaweave.runtime_plugin.pytorch.tenant import Content, Rows, ServedRecord
from numpy.typing import NDArray

__all__ = ["DeviceUploader", "HostUploader", "Ready", "Uploader"]

# Where a part of a record begins in host memory, and a band within its codes, as in the file.
PART_ALIGNMENT, BAND_ALIGNMENT = 256, 16
# Records are copied and repacked in pieces of about so many bytes; two are on their way at a time.
PIECE_BYTES = 32 << 20
HUGE_PAGE = 2 << 20


class Ready(Protocol):
    """An upload that goes on beside the host's work."""

    def done(self) -> bool:
        """Whether the tenant's bytes are in place."""
        ...

    def order(self) -> None:
        """Lets everything that the current stream gets from now on wait for the upload; the host does not wait."""
        ...

    def wait(self) -> None:
        """Waits on the host."""
        ...


class Uploader(Protocol):
    """How an arena gets its tenants' bytes."""

    def hold(self, records: Sequence[ServedRecord]) -> Any:
        """Keeps a tenant's bytes in host memory, from where it can be uploaded again and again."""
        ...

    def upload(self, held: Any, arena: library.Arena, slot: int) -> Ready:
        """Begins to fill the committed slot."""
        ...


class HostUploader:
    """Arena in host memory: the file's mapped bytes are written where the directory says."""

    def __init__(self, buffer: torch.Tensor) -> None:
        """`buffer`: the arena, uint8 on the CPU."""
        self._buffer = buffer

    def hold(self, records: Sequence[ServedRecord]) -> Sequence[ServedRecord]:
        """The records themselves: views of the file."""
        return records

    def upload(self, held: Sequence[ServedRecord], arena: library.Arena, slot: int) -> Ready:
        """Writes them."""
        rows = arena.directory_rows(slot)
        for record in held:
            if record.content is not None:
                HostRow(self._buffer, rows[record.parameter]).write(record.content)
        return _Done()


class _Done:
    def done(self) -> bool:
        return True

    def order(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        """Nothing to wait for."""


@dataclass(frozen=True)
class _Image:
    """One record as the file has it.

    Attributes:
        arguments: of its repacking but for the addresses, so that an upload costs the host little.
        fields: byte offset of each part, by its name in `library.RepackArgs`.
        sources: (byte offset, bytes) of everything to be copied.
        size: bytes.
    """

    arguments: library.RepackArgs
    fields: Mapping[str, int]
    sources: Sequence[tuple[int, NDArray[np.uint8]]]
    size: int

    @classmethod
    def of(cls, record: ServedRecord, content: Content) -> _Image:
        fields: dict[str, int] = {}
        sources = []
        position = 0
        for field, alignment, arrays in _parts(content):
            fields[field] = position = _rounded(position, PART_ALIGNMENT)
            for array in arrays:
                position = _rounded(position, alignment)
                raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                sources.append((position, raw))
                position += raw.nbytes
        return cls(library.RepackArgs(record=record.shape()), fields, sources, _rounded(position, PART_ALIGNMENT))


@dataclass(frozen=True)
class _Piece:
    """Consecutive records in pinned memory.

    Attributes:
        data: uint8, pinned.
        images: (first byte, record).
    """

    data: torch.Tensor
    images: Sequence[tuple[int, _Image]]


class DeviceUploader:
    """Arena on a GPU: pieces of pinned memory go over two streams in turn, so that one is copied while one is repacked.

    Each stream's staging memory comes from PyTorch's allocator, which hands it out again in the stream's own order.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        """`buffer`: the arena, uint8 on a GPU."""
        self._buffer = buffer
        self._streams = [torch.cuda.Stream(buffer.device) for _ in range(2)]

    def hold(self, records: Sequence[ServedRecord]) -> list[_Piece]:
        """Copies a tenant into pinned memory, by several threads."""
        images = [_Image.of(record, record.content) for record in records if record.content is not None]
        groups = list(_groups(images))
        with ThreadPoolExecutor(max_workers=8) as pool:
            return list(pool.map(self._pinned, groups))

    def upload(self, held: Sequence[_Piece], arena: library.Arena, slot: int) -> Ready:
        """Queues copies and repacks; the host does not wait."""
        for number, piece in enumerate(held):
            stream = self._streams[number % len(self._streams)]
            with torch.cuda.stream(stream):
                staging = torch.empty_like(piece.data, device=self._buffer.device)
                staging.copy_(piece.data, non_blocking=True)
                for start, image in piece.images:
                    self._repack(arena, slot, image, staging.data_ptr() + start, stream.cuda_stream)
        return _Events([stream.record_event() for stream in self._streams])

    def _repack(self, arena: library.Arena, slot: int, image: _Image, address: int, stream: int) -> None:
        arguments = image.arguments
        parameter = arguments.record.parameter
        place = arena.payload(slot, parameter)
        arguments.parameter = arena.parameters[parameter]
        arguments.payload, arguments.payload_bytes = self._buffer.data_ptr() + place.offset, place.bytes
        for field, offset in image.fields.items():
            setattr(arguments, field, address + offset)
        native_library().repack(arguments, stream)

    def _pinned(self, images: Sequence[_Image]) -> _Piece:
        """Memory is filled before it is pinned: its pages are then made by the threads that fill them."""
        starts = np.cumsum([0, *(image.size for image in images)]).tolist()
        memory = mmap.mmap(-1, _rounded(starts[-1], HUGE_PAGE))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        target = np.frombuffer(memory, np.uint8)
        for start, image in zip(starts, images, strict=False):
            for offset, raw in image.sources:
                np.copyto(target[start + offset : start + offset + raw.nbytes], raw)
        piece = _Piece(torch.from_numpy(target)[: starts[-1]], list(zip(starts, images, strict=False)))
        with torch.cuda.device(self._buffer.device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(piece.data.data_ptr(), target.nbytes, 0))
        weakref.finalize(piece, _unpin, piece.data.data_ptr(), memory).atexit = False
        return piece


def _unpin(address: int, memory: mmap.mmap) -> None:
    """`memory` is passed to live until then."""
    torch.cuda.cudart().cudaHostUnregister(address)


@dataclass(frozen=True)
class _Events:
    events: Sequence[torch.cuda.Event]

    def done(self) -> bool:
        return all(event.query() for event in self.events)

    def order(self) -> None:
        for event in self.events:
            torch.cuda.current_stream().wait_event(event)

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()


def _groups(images: Sequence[_Image]) -> Iterator[list[_Image]]:
    """Consecutive records, about PIECE_BYTES together; a larger record is a piece of its own."""
    group: list[_Image] = []
    size = 0
    for image in images:
        if group and size + image.size > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(image)
        size += image.size
    if group:
        yield group


def _parts(content: Content) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    """The parts of a record by their names in `library.RepackArgs`, how their arrays are aligned, and the arrays."""
    if isinstance(content, FactoredRecord):
        yield from _matrix_parts("v", content.v)
        yield from _matrix_parts("u", content.u)
        yield "sigma", PART_ALIGNMENT, [content.sigma]
        yield from _levels(content.v)
    elif isinstance(content, DenseRecord):
        yield from _matrix_parts("v", content.matrix)
        yield from _levels(content.matrix)
    elif isinstance(content, Rows):
        yield "indices", PART_ALIGNMENT, [content.indices.numpy()]
        yield "values", PART_ALIGNMENT, [content.values.numpy()]
    else:
        yield "values", PART_ALIGNMENT, [content.numpy()]


def _matrix_parts(side: str, matrix: PackedMatrix) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    yield f"{side}_codes", BAND_ALIGNMENT, [piece.codes for piece in matrix.bands]
    grids = [piece.grid for piece in matrix.bands if piece.grid is not None]
    if grids:
        yield f"{side}_grid", 1, grids


def _levels(matrix: PackedMatrix) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    levels = [np.array(piece.band.levels, np.float32) for piece in matrix.bands if piece.band.levels is not None]
    if levels:
        yield "levels", 1, levels


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
