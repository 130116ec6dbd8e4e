# SPDX-License-Identifier: Apache-2.0
"""Tenants in host memory, and their way into an arena: written in place on the CPU, uploaded and repacked on a GPU."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.pytorch.payload import HostRow
from deltaweave.runtime_plugin.records import RecordImage, ServedRecord, image_groups

__all__ = ["DeviceUploader", "HostUploader", "Ready", "Uploader"]

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
class _Piece:
    """Consecutive records in pinned memory.

    Attributes:
        data: uint8, pinned.
        images: (first byte, record).
    """

    data: torch.Tensor
    images: Sequence[tuple[int, RecordImage]]


class DeviceUploader:
    """Arena on a GPU: pieces of pinned memory go over two streams in turn, so that one is copied while one is repacked.

    Each stream's staging memory comes from PyTorch's allocator, which hands it out again in the stream's own order.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        """`buffer`: the arena, uint8 on a GPU."""
        self._buffer = buffer
        self._streams = [torch.cuda.Stream(buffer.device) for _ in range(2)]
        for stream in self._streams:
            # PyTorch's allocator hands memory out in the current stream's order, and takes it back in that.
            stream.wait_stream(torch.cuda.current_stream(buffer.device))
            buffer.record_stream(stream)

    def hold(self, records: Sequence[ServedRecord]) -> list[_Piece]:
        """Copies a tenant into pinned memory, by several threads."""
        groups = list(image_groups(records))
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
                    arguments = image.repack_arguments(arena, slot, self._buffer.data_ptr(), staging.data_ptr() + start)
                    native_library().repack(arguments, stream.cuda_stream)
        return _Events([stream.record_event() for stream in self._streams])

    def _pinned(self, images: Sequence[RecordImage]) -> _Piece:
        """Memory is filled before it is pinned: its pages are then made by the threads that fill them."""
        starts = np.cumsum([0, *(image.size for image in images)]).tolist()
        memory = mmap.mmap(-1, -(-starts[-1] // HUGE_PAGE) * HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        target = np.frombuffer(memory, np.uint8)
        for start, image in zip(starts, images, strict=False):
            image.write(target[start : start + image.size])
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
