# SPDX-License-Identifier: Apache-2.0
"""The arena's bookkeeping: `dw_arena_*` as one class."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import byref, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from deltaweave.runtime_plugin.library.binding import Library
from deltaweave.runtime_plugin.library.errors import LibraryError
from deltaweave.runtime_plugin.library.structs import DIRECTORY_FIELDS, ArenaConfig, ArenaStats, Parameter, Record

__all__ = ["Arena", "Payload"]


@dataclass(frozen=True)
class Payload:
    """Where a record lies in the arena: byte offset and length."""

    offset: int
    bytes: int


class Arena:
    """Slots, bytes and directory rows of one device buffer; the states are deltaweave.h's `dw_slot_state`."""

    FREE, LOADING, RESIDENT, RETIRED = range(4)

    def __init__(
        self,
        library: Library,
        *,
        device_address: int,
        size: int,
        slots: int,
        parameters: Sequence[Parameter],
        max_rank: int,
    ) -> None:
        """Begins with every slot free.

        Args:
            library: the loaded library.
            device_address: of the buffer, a multiple of 256.
            size: its bytes.
            slots: tenants that may be resident at a time, bytes allowing.
            parameters: those of the model that tenants may change, in the directory's order.
            max_rank: largest rank of any factored record.

        Raises:
            LibraryError: a value outside its contract.
        """
        self.library = library
        self.slots = slots
        self.parameters = list(parameters)
        table = (Parameter * len(self.parameters))(*self.parameters)
        config = ArenaConfig(device_address, size, slots, len(self.parameters), table, max_rank)
        self._handle = c_void_p()
        library.call("dw_arena_create", byref(config), byref(self._handle))

    def close(self) -> None:
        """Frees the bookkeeping; the buffer is the caller's."""
        if self._handle:
            self.library.destroy_arena(self._handle)
            self._handle = c_void_p()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> ArenaStats:
        """Free and used bytes and slots."""
        stats = ArenaStats()
        self._call("dw_arena_get_stats", byref(stats))
        return stats

    def tenant_bytes(self, records: Sequence[Record]) -> int:
        """Bytes that these records would take."""
        size = c_uint64()
        self._call("dw_arena_tenant_bytes", _array(records), len(records), byref(size))
        return size.value

    def reserve(self, records: Sequence[Record]) -> int:
        """Takes a slot and bytes for a tenant, which is then LOADING.

        Raises:
            ArenaFullError: no slot or no bytes; nothing was taken.
        """
        slot = c_int32()
        self._call("dw_arena_reserve", _array(records), len(records), byref(slot))
        return slot.value

    def payload(self, slot: int, parameter: int) -> Payload:
        """Where a reserved record lies."""
        offset, size = c_uint64(), c_uint64()
        self._call("dw_arena_payload", slot, parameter, byref(offset), byref(size))
        return Payload(offset.value, size.value)

    def commit(self, slot: int) -> None:
        """LOADING to RESIDENT."""
        self._call("dw_arena_commit", slot)

    def evict(self, slot: int) -> None:
        """To RETIRED, and to FREE as soon as no open step uses the slot."""
        self._call("dw_arena_evict", slot)

    def state(self, slot: int) -> int:
        """FREE, LOADING, RESIDENT or RETIRED."""
        state = c_int32()
        self._call("dw_arena_slot_state", slot, byref(state))
        return state.value

    def least_recent(self) -> int:
        """The slot to evict first."""
        slot = c_int32()
        self._call("dw_arena_least_recent", byref(slot))
        return slot.value

    def pin(self, slot: int) -> None:
        """Keeps a resident slot from eviction, until unpinned as often."""
        self._call("dw_arena_pin", slot)

    def unpin(self, slot: int) -> None:
        """Undoes one `pin`."""
        self._call("dw_arena_unpin", slot)

    def directory_rows(self, slot: int) -> list[list[int]]:
        """A slot's directory rows, [parameters][DIRECTORY_FIELDS]; zeros unless it is RESIDENT."""
        rows = (c_int64 * (len(self.parameters) * DIRECTORY_FIELDS))()
        self._call("dw_arena_directory_rows", slot, rows)
        return [list(rows[at : at + DIRECTORY_FIELDS]) for at in range(0, len(rows), DIRECTORY_FIELDS)]

    def begin_step(self, slots: Iterable[int]) -> int:
        """A step that uses `slots` begins; returns its number for `end_step`."""
        used = list(slots)
        step = c_uint64()
        self._call("dw_arena_begin_step", (c_int32 * len(used))(*used), len(used), byref(step))
        return step.value

    def end_step(self, step: int) -> None:
        """The device has finished a step."""
        self._call("dw_arena_end_step", step)

    def acquire_graph(self) -> None:
        """A captured graph now holds the buffer's address."""
        self._call("dw_arena_acquire_graph")

    def release_graph(self) -> None:
        """A captured graph is gone."""
        self._call("dw_arena_release_graph")

    def grow(self, device_address: int, size: int) -> None:
        """The caller replaced the buffer by a larger one of the same content."""
        self._call("dw_arena_grow", device_address, size)

    def _call(self, name: str, *arguments: Any) -> None:
        if not self._handle:
            raise LibraryError("the arena is closed")
        self.library.call(name, self._handle, *arguments)


def _array(records: Sequence[Record]) -> ctypes.Array[Record]:
    return (Record * len(records))(*records)
