# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes in an engine's device memory: who has a slot, what is uploaded, and what may be freed when.

The bookkeeping is libdeltaweave's, as in the PyTorch host; memory, streams and events are cuda-python's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.library import DIRECTORY_FIELDS, ArenaFullError, ArenaStats, Library
from deltaweave.runtime_plugin.records import RecordImage, image_groups
from deltaweave.runtime_plugin.trt.errors import EngineError
from deltaweave.runtime_plugin.trt.manifest import GraphInfo
from deltaweave.runtime_plugin.trt.memory import DeviceMemory, Event, PinnedMemory, Stream
from deltaweave.runtime_plugin.trt.tenant import Tenant
from numpy.typing import NDArray

__all__ = ["SlotTables", "TenantArena"]

ROW_BYTES = DIRECTORY_FIELDS * 8


@dataclass(frozen=True)
class _Piece:
    """Consecutive records in pinned memory: (first byte, record)."""

    memory: PinnedMemory
    images: Sequence[tuple[int, RecordImage]]

    @classmethod
    def of(cls, images: Sequence[RecordImage]) -> _Piece:
        starts = np.cumsum([0, *(image.size for image in images)]).tolist()
        memory = PinnedMemory((starts[-1],), np.uint8)
        for start, image in zip(starts, images, strict=False):
            image.write(memory.array[start : start + image.size])
        return cls(memory, list(zip(starts, images, strict=False)))


class _Uploader:
    """Two streams in turn, each with staging memory: one piece is copied while another is repacked."""

    def __init__(self, lib: Library, buffer: DeviceMemory) -> None:
        self._library, self._buffer = lib, buffer
        self._streams = [Stream(), Stream()]
        self._staging = [DeviceMemory(0), DeviceMemory(0)]

    def upload(self, held: Sequence[_Piece], book: library.Arena, slot: int) -> list[Event]:
        """Queues copies and repacks; the host does not wait, but where staging memory has to grow."""
        for number, piece in enumerate(held):
            turn = number % len(self._streams)
            stream, size = self._streams[turn], piece.memory.array.nbytes
            if self._staging[turn].size < size:
                stream.synchronize()
                self._staging[turn].free()
                self._staging[turn] = DeviceMemory(size)
            staging = self._staging[turn].address
            stream.upload(staging, piece.memory.address, size)
            for start, image in piece.images:
                arguments = image.repack_arguments(book, slot, self._buffer.address, staging + start)
                self._library.repack(arguments, stream.handle)
        return [Event(stream) for stream in self._streams]


@dataclass
class _Entry:
    """A tenant, its bytes on the host, and its place on the device if it has one.

    Attributes:
        ready: the upload that its directory rows still wait for.
        experts: of a fusion, those that are deltas, by their places; they come and stay with it.
    """

    tenant: Tenant
    held: Sequence[_Piece]
    slot: int | None = None
    ready: list[Event] | None = None
    experts: dict[int, _Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, tenant: Tenant) -> _Entry:
        """Copies a tenant to the host's pinned memory."""
        experts = {place: cls.of(expert) for place, expert in tenant.experts.items()}
        return cls(tenant, [_Piece.of(images) for images in image_groups(tenant.records)], experts=experts)

    @property
    def parts(self) -> list[_Entry]:
        """Everything that needs a slot for it to be served."""
        return [self, *self.experts.values()]


class SlotTables:
    """What a slot's tenant changes beside parameters, on the device; the last row is the base's."""

    def __init__(self, graph: GraphInfo) -> None:
        """The base's in every row."""
        rows, self._half = graph.slots + 1, graph.head_dim // 2
        self.frequencies = DeviceMemory(rows * self._half * 4)
        self.scale = DeviceMemory(rows * 4)
        self.vocabulary = DeviceMemory(rows * 8)
        stream, base = Stream(), np.array(graph.inverse_frequencies, np.float32)
        for slot in range(rows):
            self.write(stream, slot, base, graph.rotary_scale, graph.base_vocabulary)
        stream.synchronize()

    def write(self, stream: Stream, slot: int, frequencies: NDArray[np.float32], scale: float, vocabulary: int) -> None:
        """Makes a slot a tenant's, in the stream's order. CUDA has read pageable memory when it returns."""
        row = self._half * 4
        for memory, size, value in (
            (self.frequencies, row, np.ascontiguousarray(frequencies, np.float32)),
            (self.scale, 4, np.array([scale], np.float32)),
            (self.vocabulary, 8, np.array([vocabulary], np.int64)),
        ):
            stream.upload(memory.address + slot * size, value.ctypes.data, size)


class TenantArena:
    """Tenants of one engine, resident on the device or held on the host. Not thread-safe.

    Attributes:
        buffer: the tenants' bytes.
        address: int64 [1], where buffer lies.
        directory: int64 [parameters, slots, fields], where they lie.
        tables: what tenants change beside parameters.
    """

    def __init__(self, lib: Library, graph: GraphInfo, capacity_bytes: int, stream: Stream) -> None:
        """Takes the device memory; `stream` is the one that steps run on.

        Raises:
            LibraryError: sizes that the kernels do not serve.
        """
        table = graph.table()
        self._graph, self._stream, self._parameters = graph, stream, len(table)
        self.buffer = DeviceMemory(capacity_bytes)
        self.address = DeviceMemory(8)
        address = np.array([self.buffer.address], np.int64)
        stream.upload(self.address.address, address.ctypes.data, 8)
        self.directory = DeviceMemory(len(table) * graph.slots * ROW_BYTES)
        self.tables = SlotTables(graph)
        self._book = library.Arena(
            lib,
            device_address=self.buffer.address,
            size=capacity_bytes,
            slots=graph.slots,
            parameters=table.shapes(),
            max_rank=graph.max_rank,
        )
        self._uploader = _Uploader(lib, self.buffer)
        self._entries: dict[str, _Entry] = {}
        self._open_steps: deque[tuple[int, Event]] = deque()

    def close(self) -> None:
        """Frees the bookkeeping; memory goes with the object."""
        self._book.close()

    @property
    def names(self) -> list[str]:
        """All tenants, resident or not."""
        return list(self._entries)

    def __getitem__(self, name: str) -> Tenant:
        """A tenant by its name.

        Raises:
            EngineError: no such tenant.
        """
        return self._entry(name).tenant

    def add(self, tenant: Tenant) -> None:
        """Holds a tenant's bytes on the host and begins to upload them, evicting others if need be.

        Raises:
            EngineError: the name is taken.
            ArenaFullError: it does not fit. It is then no tenant.
        """
        if tenant.name in self._entries:
            raise EngineError(f"{tenant.path}: a tenant {tenant.name!r} is there already")
        size = sum(self._book.tenant_bytes(part.shapes) for part in (tenant, *tenant.experts.values()))
        whole = self._book.stats().bytes
        if size > whole:
            raise ArenaFullError(f"tenant {tenant.name!r} takes {size} bytes, the arena has {whole}")
        entry = _Entry.of(tenant)
        self._entries[tenant.name] = entry
        try:
            self._bring_together(entry.parts)
        except BaseException:
            self.remove(tenant.name)
            raise

    def remove(self, name: str) -> None:
        """Forgets a tenant, on the host too; its bytes are reused once the last step with it is done."""
        self.evict(name)
        del self._entries[name]  # a fusion's experts are its own, and go with it

    def evict(self, name: str) -> None:
        """Takes a tenant off the device; the next step that wants it brings it back."""
        for part in self._entry(name).parts:
            if part.slot is not None:
                self._release(part)

    def is_resident(self, name: str) -> bool:
        """Whether a tenant has a slot, and so have a fusion's experts."""
        return all(part.slot is not None for part in self._entry(name).parts)

    def resident(self, names: Iterable[str | None]) -> list[int]:
        """The slots of some tenants, brought to the device where they are not; None, the base, has -1.

        Whatever the stream gets from now on finds them there.

        Raises:
            EngineError: no such tenant.
            ArenaFullError: they do not fit together.
        """
        wanted = [None if name is None else self._entry(name) for name in names]
        distinct = list({id(part): part for entry in wanted if entry is not None for part in entry.parts}.values())
        self._bring_together(distinct)
        for entry in distinct:
            self._publish(entry)
        return [-1 if entry is None or entry.slot is None else entry.slot for entry in wanted]

    @contextmanager
    def step(self, names: Sequence[str | None]) -> Iterator[list[int]]:
        """A step with some tenants: gives their slots, whose bytes stay until the device is done with the step."""
        self._collect()
        slots = self.resident(names)
        parts = [part for name in set(names) if name is not None for part in self._entry(name).parts]
        number = self._book.begin_step([part.slot for part in parts if part.slot is not None])
        try:
            yield slots
        finally:
            self._open_steps.append((number, Event(self._stream)))

    def expert_slots(self, names: Sequence[str | None], place: int) -> list[int]:
        """Slots of the deltas that are the experts at a place of some resident tenants' gates; -1 for none."""
        entries = [None if name is None else self._entry(name).experts.get(place) for name in names]
        return [-1 if entry is None or entry.slot is None else entry.slot for entry in entries]

    def acquire_graph(self) -> None:
        """A captured graph now holds the arena's addresses."""
        self._book.acquire_graph()

    def release_graph(self) -> None:
        """A captured graph is gone."""
        self._book.release_graph()

    def stats(self) -> ArenaStats:
        """Bytes and slots, free and used."""
        self._collect()
        return self._book.stats()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise EngineError(f"no tenant {name!r}; there are {', '.join(sorted(self._entries)) or 'none'}")
        return self._entries[name]

    def _bring_together(self, entries: Sequence[_Entry]) -> None:
        """Gives all of them a slot; none makes room for another."""
        held: list[int] = []
        try:
            for entry in sorted(entries, key=lambda entry: entry.slot is None):
                slot = self._bring(entry) if entry.slot is None else entry.slot
                self._book.pin(slot)
                held.append(slot)
        finally:
            for slot in held:
                self._book.unpin(slot)

    def _bring(self, entry: _Entry) -> int:
        """Takes a slot, evicting the least recently used tenants that stand in the way, and begins the upload."""
        while True:
            try:
                slot = self._book.reserve(entry.tenant.shapes)
                break
            except ArenaFullError as full:
                self._make_room(entry.tenant.name, full)
        self._book.commit(slot)
        try:
            entry.ready = self._uploader.upload(entry.held, self._book, slot)
        except BaseException:
            self._book.evict(slot)
            raise
        entry.slot = slot
        return slot

    def _make_room(self, name: str, full: ArenaFullError) -> None:
        """Frees something: what steps are done with, or soon will be, or else the least recently used tenant."""
        if self._collect():
            return
        if self._open_steps and self._book.stats().retired_slots:
            self._open_steps[0][1].wait()
            return
        try:
            victim = self._book.least_recent()
        except ArenaFullError:
            raise ArenaFullError(f"tenant {name!r} does not fit: {full}; nothing is left to evict") from full
        parts = (part for entry in self._entries.values() for part in entry.parts)
        self._release(next(part for part in parts if part.slot == victim))

    def _release(self, entry: _Entry) -> None:
        assert entry.slot is not None
        for event in entry.ready or []:  # its bytes must not go to somebody else while they are being written
            event.wait()
        self._book.evict(entry.slot)
        self._stream.clear_rows(*self._column(entry.slot), ROW_BYTES, self._parameters)
        entry.slot = entry.ready = None

    def _publish(self, entry: _Entry) -> None:
        """Writes a new resident's directory rows behind its upload, in the stream's order."""
        if entry.slot is None or entry.ready is None:
            return
        for event in entry.ready:
            event.order(self._stream)
        rows = np.array(self._book.directory_rows(entry.slot), np.int64)
        self._stream.upload_rows(*self._column(entry.slot), rows.ctypes.data, ROW_BYTES, self._parameters)
        tenant = entry.tenant
        self.tables.write(self._stream, entry.slot, tenant.inverse_frequencies, tenant.rotary_scale, tenant.vocabulary)
        entry.ready = None

    def _column(self, slot: int) -> tuple[int, int]:
        """Address of a slot's first directory row, and how far its rows lie apart."""
        return self.directory.address + slot * ROW_BYTES, self._graph.slots * ROW_BYTES

    def _collect(self) -> bool:
        """Ends the steps that the device has finished; whether there was one."""
        ended = False
        while self._open_steps and self._open_steps[0][1].done():
            self._book.end_step(self._open_steps.popleft()[0])
            ended = True
        return ended
