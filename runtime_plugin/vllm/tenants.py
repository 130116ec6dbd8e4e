# SPDX-License-Identifier: Apache-2.0
"""A worker's tenants by vLLM's adapter ids: loaded, resident, forgotten; whose a step's tokens are. No vLLM here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from deltaweave.runtime_plugin.library import ArenaFullError
from deltaweave.runtime_plugin.pytorch import Arena, ArenaError
from deltaweave.runtime_plugin.pytorch.arena import HeldTenant, OpenStep
from deltaweave.runtime_plugin.pytorch.tenant import Tenant
from deltaweave.runtime_plugin.tables import EMBEDDING, HEAD
from deltaweave.runtime_plugin.vllm.metrics import TenantCounts
from deltaweave.runtime_plugin.vllm.reader import Adapter, TenantReader
from deltaweave.runtime_plugin.vllm.step import Step
from numpy.typing import NDArray

__all__ = ["Adapter", "Tenants"]


class Tenants:
    """All tenants of a worker.

    Not thread-safe, for vLLM calls its workers one call after another; but `read_ahead` may be called by any thread.

    Attributes:
        counts: for metrics.
    """

    def __init__(self, step: Step, *, at_once: int, most: int, accept_base: bool) -> None:
        """Begins without any.

        Args:
            step: of the process, with its arena.
            at_once: the most in one step; so many of the largest must fit into the arena together.
            most: the most in host memory; the least recently asked for are forgotten, and read again when wanted.
            accept_base: do not compare the base with that of a tenant's file.
        """
        self.step = step
        self.counts = TenantCounts()
        self._at_once, self._most, self._accept_base = at_once, most, accept_base
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()  # the least recently asked for or used first
        self._sizes: dict[int, int] = {}  # of all that may be asked for, forgotten ones too
        self._own_logits: set[int] = set()  # of those in host memory, whose logits are not the base's
        self._idle: set[int] = set()  # stand-ins of warm-up: they compute as the base
        self._open: OpenStep | None = None
        self._reader = TenantReader(self._read)
        # Held where the adapters or their order change: `read_ahead` changes the order in any thread.
        # Else a thread that has just seen no tenant of an id could begin to read it again when it is there.
        self._handing_over = Lock()

    @property
    def arena(self) -> Arena:
        """Of the tenants."""
        return self.step.arena

    @property
    def ids(self) -> set[int]:
        """Of all tenants in host memory, and of stand-ins."""
        return {*self._adapters, *self._idle, *(adapter.id for adapter in self._reader.finished())}

    def read_ahead(self, adapter: Adapter) -> Future[HeldTenant] | None:
        """Begins to read a tenant's file beside the steps, for which `add` and `begin` wait; one that is there is kept.

        Returns:
            what comes, or raises what `add` would; None for a tenant that is there.

        Raises:
            ArenaError: the id is another tenant's.
        """
        with self._handing_over:
            known = self._adapters.get(adapter.id)
            if known is None:
                return self._reader.begin(adapter)
            self._adapters.move_to_end(adapter.id)  # else it may be forgotten before its request's first step
        known.require_same(adapter)
        return None

    def add(self, adapter: Adapter) -> bool:
        """Reads a tenant's file into host memory and begins its upload; whether it was not there.

        Raises:
            ArenaError: the id is another tenant's, or with it the largest tenants would not fit together.
            AttachError: a file that the base cannot serve.
            FormatError: no such file, or not a delta or a fusion.
        """
        if adapter.id in self._adapters:
            self._adapters[adapter.id].require_same(adapter)
            with self._handing_over:
                self._adapters.move_to_end(adapter.id)
            return False
        self._close()
        self._admit(adapter)
        self._count()
        return True

    def admit_finished(self) -> None:
        """Makes tenants of what was read ahead, so that it counts among the most that host memory may have."""
        self._close()
        for adapter in self._reader.finished():
            self._admit(adapter)

    def remove(self, adapter_id: int) -> bool:
        """Forgets a tenant; whether it was there."""
        self._idle.discard(adapter_id)
        read = self._reader.drop(adapter_id)
        self._sizes.pop(adapter_id, None)
        with self._handing_over:
            known = self._adapters.pop(adapter_id, None)
        if known is None:
            return read
        self._close()
        self._let_go(adapter_id)
        self._count()
        return True

    def stand_in(self, adapter_id: int) -> None:
        """An id that warm-up steps use: it computes as the base."""
        self._idle.add(adapter_id)

    def clear_stand_ins(self) -> None:
        """Warm-up is over."""
        self._idle.clear()

    def begin(self, tokens: Sequence[int], sampled: Sequence[int], adapters: Mapping[int, Adapter]) -> None:
        """A step begins: its tenants are brought to the device, and every token gets its slot.

        The last step's kernels have been queued by now, so its tenants are held until the device has come this far.

        Args:
            tokens: adapter id of each token, 0 for the base.
            sampled: adapter id of each row that is sampled.
            adapters: of the step's requests.

        Raises:
            ArenaError: an id that no request names, or that is another tenant's already.
        """
        self.admit_finished()
        self.arena.switch_if_quiet()
        ids = [adapter_id for adapter_id in dict.fromkeys((*tokens, *sampled)) if adapter_id]
        served = [adapter_id for adapter_id in ids if adapter_id not in self._idle]
        for adapter_id in served:
            wanted = adapters.get(adapter_id) or self._adapters.get(adapter_id)
            if wanted is None:
                raise ArenaError(f"no tenant has the adapter id {adapter_id}")
            self.add(wanted)
        slots = self._resident(served) if served else {}
        experts = [self._experts(served, place) for place in self.step.places]
        self.step.choose(
            _slots(tokens, slots),
            _slots(sampled, slots),
            [_slots(tokens, found) for found in experts],
            fused=any(self.arena[str(adapter_id)].is_fusion for adapter_id in served),
            own_logits=not self._own_logits.isdisjoint(served),
        )

    def warm(self, *, active: bool, fused: bool) -> None:
        """For a step of stand-ins: whether the tenants' kernels run, as they would with tenants, and fusions' too."""
        self.arena.disturb()  # warm-up and captures have streams of their own
        self.step.active = self.step.own_logits = active
        self.step.fused = active and fused and self.step.fusions

    def _read(self, adapter: Adapter) -> HeldTenant:
        """In the reader's thread, one tenant after another; steps go on and see nothing of it."""
        held = self.arena.read(Path(adapter.path), str(adapter.id), accept_base=self._accept_base)
        self._require_servable(adapter, held)
        self._sizes[adapter.id] = self._require_room(adapter, held)
        return held

    def _admit(self, adapter: Adapter) -> None:
        try:
            held, seconds = self._reader.wait(adapter)
            self.arena.admit(held)
            if self._has_own_logits(held.tenant):
                self._own_logits.add(adapter.id)
            with self._handing_over:
                self._adapters[adapter.id] = adapter
                beyond = len(self._adapters) - self._most
                forgotten = [self._adapters.popitem(last=False)[0] for _ in range(beyond)]
        finally:
            self._reader.drop(adapter.id)
        self.counts.loaded(seconds)
        for adapter_id in forgotten:
            self._let_go(adapter_id)

    def _has_own_logits(self, tenant: Tenant) -> bool:
        base, head = self.arena.table[EMBEDDING].shape[0], self.arena.table[HEAD].index
        return tenant.vocabulary != base or any(record.parameter == head for record in tenant.records)

    def _require_servable(self, adapter: Adapter, held: HeldTenant) -> None:
        tenant = held.tenant
        if tenant.is_fusion and not self.step.fusions:
            raise ArenaError(f"{adapter.path}: a fusion, and the server was started with fusions off")
        if beyond := [place for place in tenant.experts if place not in self.step.places]:
            raise ArenaError(
                f"{adapter.path}: expert {max(beyond)} is a delta, deltas are served as the first "
                f"{len(self.step.places)} experts only: raise delta_experts to {max(beyond) + 1}"
            )

    def _require_room(self, adapter: Adapter, held: HeldTenant) -> int:
        """The tenants of any step must fit into the arena together, those too that it has to read again."""
        size, whole = self.arena.held_bytes(held), len(self.arena.buffer)
        sizes = sorted({**self._sizes, adapter.id: size}.values(), reverse=True)[: self._at_once]
        if sum(sizes) > whole:
            raise ArenaError(
                f"{adapter.path}: takes {size} bytes; the {len(sizes)} largest tenants, which one step may have, would "
                f"take {sum(sizes)} of the arena's {whole}: raise arena_gib or lower --max-loras"
            )
        return size

    def _let_go(self, adapter_id: int) -> None:
        self._own_logits.discard(adapter_id)
        self.arena.remove(str(adapter_id))

    def _resident(self, ids: Sequence[int]) -> dict[int, int]:
        """Slots of a step's tenants, which stay until the step is closed."""
        names = [str(adapter_id) for adapter_id in ids]
        try:
            slots = self._opened(names)
        except ArenaFullError:  # room enough, but in pieces: from an empty arena they lie side by side
            for name in self.arena.names:
                self.arena.evict(name)
            if self.arena.buffer.is_cuda:
                torch.cuda.synchronize(self.arena.buffer.device)
            slots = self._opened(names)
        self._count()
        return dict(zip(ids, slots, strict=True))

    def _opened(self, names: Sequence[str]) -> list[int]:
        self._open = self.arena.begin_step(names)
        return self._open.slots

    def _experts(self, ids: Sequence[int], place: int) -> dict[int, int]:
        found = self.arena.expert_slots([str(adapter_id) for adapter_id in ids], place)
        return dict(zip(ids, found, strict=True))

    def _close(self) -> None:
        """Ends the last step, in the device's order."""
        if self._open is not None:
            step, self._open = self._open, None
            self.arena.end_step(step)

    def _count(self) -> None:
        resident = sum(self.arena.is_resident(name) for name in self.arena.names)
        self.counts.standing(resident, len(self._adapters), self.arena.uploads, self.arena.evictions)


def _slots(ids: Sequence[int], slots: Mapping[int, int]) -> NDArray[np.int32]:
    """Of tokens, from those of tenants; -1 where there is none."""
    wanted = np.asarray(ids, np.int64)
    found = np.full(len(wanted), -1, np.int32)
    for adapter_id, slot in slots.items():
        found[wanted == adapter_id] = slot
    return found
