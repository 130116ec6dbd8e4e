# SPDX-License-Identifier: Apache-2.0
"""The arena: fine-tunes of one base model in one device buffer, swapped between steps.

Bookkeeping (which bytes and which slot are whose, and until when) is libdeltaweave's; this module owns the memory: the
buffer, the directory, every tenant's bytes on the host, and the events that say when the device is done with them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deltaweave.formats import Delta, DeltaweaveError, Fusion, open_tenant
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.library import DIRECTORY_FIELDS, ArenaFullError, ArenaStats, LibraryError
from deltaweave.runtime_plugin.pytorch.context_switch import quiet_switch
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.pytorch.settings import SlotSettings, pinned
from deltaweave.runtime_plugin.pytorch.tenant import ParameterTable, Tenant, load_fusion, load_tenant
from deltaweave.runtime_plugin.pytorch.upload import DeviceUploader, HostUploader, Ready, Uploader
from deltaweave.runtime_plugin.records import ServedRecord
from torch import nn

__all__ = ["Arena", "ArenaError", "FusionWork", "HeldTenant", "OpenStep"]

ALIGNMENT = 256
# Eight LoRAs of rank 64 fit, however small the model is.
FUSION_RANK = 512


class ArenaError(DeltaweaveError, ValueError):
    """A tenant's name that is unknown or taken, or an arena that is used otherwise than it allows."""


@dataclass
class HeldTenant:
    """A tenant, its bytes on the host, and its place in the arena if it has one; `Arena.read` makes them.

    Attributes:
        experts: of a fusion, those that are deltas, by their places; they come and stay with it.
        ready: the upload that its directory rows still wait for.
    """

    tenant: Tenant
    held: Any
    slot: int | None = None
    ready: Ready | None = None
    pins: int = 0
    experts: dict[int, HeldTenant] = field(default_factory=dict)

    @property
    def parts(self) -> list[HeldTenant]:
        """Everything that needs a slot for it to be served."""
        return [self, *self.experts.values()]


@dataclass(frozen=True)
class OpenStep:
    """A step that has begun.

    Attributes:
        number: in the bookkeeping.
        slots: of the tenants, as they were named.
        used: all slots that it needs, those of fusions' experts too.
    """

    number: int
    slots: list[int]
    used: set[int]


@dataclass(frozen=True)
class FusionWork:
    """What a step does for fusions, whichever rows are theirs: captured graphs hold for one of these.

    Attributes:
        gated: some tenant is a fusion.
        delta_experts: places at which some fusion has a delta as its expert, rising.
    """

    gated: bool = False
    delta_experts: tuple[int, ...] = ()


class Arena:
    """Tenants of one base model, resident on the device or held on the host, and the slots they have.

    Not thread-safe: one thread adds, evicts and steps. Steps run on the stream that is current when they begin.

    Attributes:
        table: what tenants may change.
        buffer: uint8, the tenants' bytes.
        directory: int64 [parameters, slots, fields], where they lie.
        settings: what tenants change beside parameters.
        max_rank: the largest rank of a record.
        uploads: how often a tenant, or an expert of a fusion, was brought to the device.
        evictions: how often one was taken off it.
    """

    def __init__(
        self,
        table: ParameterTable,
        *,
        capacity_bytes: int,
        slots: int,
        device: torch.device,
        max_rank: int,
        switch_contexts: bool = True,
    ) -> None:
        """Takes the device memory; see `for_model`."""
        self.table = table
        self.max_rank = max_rank
        self.uploads = self.evictions = 0
        self.buffer = _aligned_bytes(capacity_bytes, device)
        self.directory = torch.zeros(len(table), slots, DIRECTORY_FIELDS, dtype=torch.int64, device=device)
        self.settings = SlotSettings(table, slots, device)
        self._uploader: Uploader = DeviceUploader(self.buffer) if device.type == "cuda" else HostUploader(self.buffer)
        self._book = library.Arena(
            native_library(),
            device_address=self.buffer.data_ptr(),
            size=capacity_bytes,
            slots=slots,
            parameters=table.shapes(),
            max_rank=max_rank,
        )
        weakref.finalize(self, self._book.close)
        self._quiet = quiet_switch(self.buffer.device, wanted=switch_contexts)
        self._entries: dict[str, HeldTenant] = {}
        self._open_steps: deque[tuple[int, torch.cuda.Event]] = deque()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        capacity_bytes: int,
        slots: int = 64,
        vocabulary: int | None = None,
        max_rank: int | None = None,
        device: torch.device | str | None = None,
        switch_contexts: bool = True,
    ) -> Arena:
        """An arena for fine-tunes of a model.

        Args:
            model: a Hugging Face decoder (Llama, Mistral, Qwen2, Qwen3) holding the base, on its device.
            capacity_bytes: of device memory for tenants.
            slots: tenants that may be resident at a time, bytes allowing.
            vocabulary: the most tokens that a tenant may have; None for the base's and 256 more.
            max_rank: largest rank of a tenant's record, and of a fusion's LoRAs of a layer together; None for what the
                model's shapes allow, from 512 up to 4096.
            device: None for the model's.
            switch_contexts: shorten the gaps between kernels by a second CUDA context, 0.5 GiB (`context_switch`).

        Raises:
            AttachError: the model is none of these, or has a delta attached.
            LibraryError: libdeltaweave is not built, or cannot serve such shapes.
        """
        home = torch.device(device) if device is not None else next(model.parameters()).device
        table = ParameterTable(model, vocabulary, gates=True)
        return cls(
            table,
            capacity_bytes=capacity_bytes,
            slots=slots,
            device=home,
            max_rank=max(table.largest_rank(), FUSION_RANK) if max_rank is None else max_rank,
            switch_contexts=switch_contexts,
        )

    @property
    def names(self) -> list[str]:
        """All tenants, resident or not."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tenant:
        """A tenant by its name."""
        return self._entry(name).tenant

    @property
    def fusion_work(self) -> FusionWork:
        """What a step has to do for the fusions among the tenants."""
        tenants = [entry.tenant for entry in self._entries.values()]
        places = {place for tenant in tenants for place in tenant.experts}
        return FusionWork(any(tenant.is_fusion for tenant in tenants), tuple(sorted(places)))

    def add(self, source: Delta | Fusion | str | Path, name: str | None = None, *, accept_base: bool = False) -> Tenant:
        """Makes a fine-tune or fusion a tenant: its bytes go to host memory and, evicting others, to the device.

        The host does not wait for the upload; the first step that uses the tenant does, on the device.

        Args:
            source: a file; or a delta that is open, or a fusion read by `resolve_fusion` (which may be closed
                afterwards).
            name: what requests call it; None for the file's name without its ending.
            accept_base: do not compare the model's weights with the base that the file was made from.

        Raises:
            AttachError: another base, or a record that an arena does not serve.
            ArenaError: the name is taken.
            ArenaFullError: it cannot fit beside the tenants that are pinned or in use. It is then no tenant.
        """
        if isinstance(source, Fusion) and name is None:
            raise ArenaError("a fusion that was read has no name: give it one")
        path = _path(source, name)
        chosen = path.name.partition(".")[0] if name is None else name
        self._require_free(path, chosen)
        return self.admit(self.read(source, chosen, accept_base=accept_base))

    def read(self, source: Delta | Fusion | str | Path, name: str, *, accept_base: bool = False) -> HeldTenant:
        """The first half of `add`: a tenant in host memory, checked, that `admit` makes one of the arena's.

        This half may be done by any thread, beside steps and beside everything else.

        Raises:
            AttachError, ArenaFullError: as `add`.
        """
        with nullcontext(source) if isinstance(source, (Delta, Fusion)) else open_tenant(source) as opened:
            if isinstance(opened, Delta):
                return self._held(load_tenant(self.table, opened, name, accept_base=accept_base))
            return self._held(load_fusion(self.table, opened, name, _path(source, name), accept_base=accept_base))

    def admit(self, held: HeldTenant) -> Tenant:
        """The second half: the tenant is there from now on, and its bytes go to the device.

        Raises:
            ArenaError, ArenaFullError: as `add`.
        """
        tenant = held.tenant
        self._require_free(tenant.path, tenant.name)
        self._entries[tenant.name] = held
        try:
            self._bring_together(held.parts)
        except BaseException:
            for part in held.parts:
                if part.slot is not None:
                    self._release(part)
            del self._entries[tenant.name]
            raise
        return tenant

    def remove(self, name: str) -> None:
        """Forgets a tenant, on the host too.

        Raises:
            ArenaError: no such tenant, or a pinned one.
        """
        self.evict(name)
        del self._entries[name]  # a fusion's experts are its own, and go with it

    def evict(self, name: str) -> None:
        """Takes a tenant off the device; its bytes are reused once the last step with it is done.

        Raises:
            ArenaError: no such tenant, or a pinned one.
        """
        entry = self._entry(name)
        if entry.pins:
            raise ArenaError(f"tenant {name!r} is pinned")
        for part in entry.parts:
            if part.slot is not None:
                self._release(part)

    def pin(self, name: str) -> None:
        """Makes a tenant resident and keeps it so, until unpinned as often."""
        self.resident([name])
        entry = self._entry(name)
        for slot in _slots(entry.parts):
            self._book.pin(slot)
        entry.pins += 1

    def unpin(self, name: str) -> None:
        """Undoes one `pin`.

        Raises:
            ArenaError: no such tenant, or one that is not pinned.
        """
        entry = self._entry(name)
        if not entry.pins or entry.slot is None:
            raise ArenaError(f"tenant {name!r} is not pinned")
        for slot in _slots(entry.parts):
            self._book.unpin(slot)
        entry.pins -= 1

    def is_resident(self, name: str) -> bool:
        """Whether a tenant has a slot, and so have a fusion's experts."""
        return all(part.slot is not None for part in self._entry(name).parts)

    def resident(self, names: Iterable[str | None]) -> list[int]:
        """The slots of some tenants, which are brought to the device where they are not; None, the base, has -1.

        Whatever the current stream gets from now on finds them there.

        Raises:
            ArenaError: no such tenant.
            ArenaFullError: they do not fit together, or beside what is pinned or in use.
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
        step = self.begin_step(names)
        try:
            yield step.slots
        finally:
            self.end_step(step)

    def begin_step(self, names: Sequence[str | None]) -> OpenStep:
        """Brings tenants to the device and keeps them there until `end_step`; see `step`."""
        self._collect()
        self.switch_if_quiet()
        slots = self.resident(names)
        entries = [self._entry(name) for name in set(names) if name is not None]
        used = {slot for entry in entries for slot in _slots(entry.parts)}
        number = self._book.begin_step(used)
        for slot in used:  # whoever is added meanwhile must not take the place of a tenant whose kernels are to come
            self._book.pin(slot)
        return OpenStep(number, slots, used)

    def end_step(self, step: OpenStep) -> None:
        """The step's last kernel is in the current stream; its tenants stay until the device is done with that."""
        for slot in step.used:
            self._book.unpin(slot)
        if self.buffer.is_cuda:
            self._open_steps.append((step.number, torch.cuda.current_stream(self.buffer.device).record_event()))
        else:
            self._book.end_step(step.number)

    def switch_if_quiet(self) -> None:
        """A step is about to begin, with tenants or without: see `context_switch`; `begin_step` does it too."""
        self._quiet.switch_if_quiet()

    def disturb(self) -> None:
        """Kernels have run in other streams than steps', as captures do; uploads are known."""
        self._quiet.disturb()

    def expert_slots(self, names: Sequence[str | None], place: int) -> list[int]:
        """Slots of the deltas that are the experts at a place of some resident tenants' gates; -1 for none."""
        entries = [None if name is None else self._entry(name).experts.get(place) for name in names]
        return [-1 if entry is None or entry.slot is None else entry.slot for entry in entries]

    def stats(self) -> ArenaStats:
        """Bytes and slots, free and used."""
        self._collect()
        return self._book.stats()

    def acquire_graph(self) -> None:
        """A captured CUDA graph now holds the arena's addresses."""
        self._book.acquire_graph()
        self.disturb()

    def release_graph(self) -> None:
        """A captured CUDA graph is gone."""
        self._book.release_graph()

    def tenant_bytes(self, name: str) -> int:
        """Device bytes that a tenant takes, a fusion's experts included."""
        return self.held_bytes(self._entry(name))

    def held_bytes(self, held: HeldTenant) -> int:
        """The same of one that may not be admitted yet."""
        return sum(self._bytes(part.tenant) for part in held.parts)

    def _require_free(self, path: Path, name: str) -> None:
        if name in self._entries:
            raise ArenaError(f"{path}: a tenant {name!r} is there already")

    def _held(self, tenant: Tenant) -> HeldTenant:
        """Copies a tenant's bytes, if there is room for them in the empty arena."""
        self._require_room(tenant)
        experts = {
            place: HeldTenant(expert, self._uploader.hold(expert.records)) for place, expert in tenant.experts.items()
        }
        return HeldTenant(tenant, self._uploader.hold(tenant.records), experts=experts)

    def _entry(self, name: str) -> HeldTenant:
        if name not in self._entries:
            raise ArenaError(f"no tenant {name!r}; there are {', '.join(sorted(self._entries)) or 'none'}")
        return self._entries[name]

    def _bytes(self, tenant: Tenant) -> int:
        return self._book.tenant_bytes(tenant.shapes)

    def _require_room(self, tenant: Tenant) -> None:
        """Refuses what would not fit into the empty arena, before anybody is evicted for it."""
        parts = [tenant, *tenant.experts.values()]
        for part in parts:
            for record in part.records:
                if record.content is not None:
                    self._require_servable(part, record)
        size, whole = sum(map(self._bytes, parts)), len(self.buffer)
        if size > whole:
            raise ArenaFullError(f"tenant {tenant.name!r} takes {size} bytes, the arena has {whole}")

    def _require_servable(self, tenant: Tenant, record: ServedRecord) -> None:
        try:
            self._book.tenant_bytes([record.shape()])
        except LibraryError as error:
            raise AttachError(f"{tenant.path}: {self.table.name(record.parameter)}: {error}") from error

    def _bring_together(self, entries: Sequence[HeldTenant]) -> None:
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

    def _bring(self, entry: HeldTenant) -> int:
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
        self._quiet.disturb(entry.ready)
        entry.slot = slot
        self.uploads += 1
        return slot

    def _make_room(self, name: str, full: ArenaFullError) -> None:
        """Frees something: what steps are done with, or soon will be, or else the least recently used tenant."""
        if self._collect():
            return
        if self._open_steps and self._book.stats().retired_slots:
            self._open_steps[0][1].synchronize()
            return
        try:
            victim = self._book.least_recent()
        except ArenaFullError:
            raise ArenaFullError(f"tenant {name!r} does not fit: {full}; nothing is left to evict") from full
        parts = (part for entry in self._entries.values() for part in entry.parts)
        self._release(next(part for part in parts if part.slot == victim))

    def _release(self, entry: HeldTenant) -> None:
        assert entry.slot is not None
        if entry.ready is not None:  # its bytes must not go to somebody else while they are being written
            entry.ready.wait()
        self._book.evict(entry.slot)
        self.directory[:, entry.slot] = 0
        entry.slot = entry.ready = None
        self.evictions += 1

    def _publish(self, entry: HeldTenant) -> None:
        """Writes a new resident's directory rows behind its upload, in the current stream's order."""
        if entry.slot is None or entry.ready is None:
            return
        entry.ready.order()
        rows = torch.tensor(self._book.directory_rows(entry.slot))
        self.directory[:, entry.slot].copy_(pinned(rows, self.directory), non_blocking=True)
        self.settings.write(entry.slot, entry.tenant)
        entry.ready = None

    def _collect(self) -> bool:
        """Ends the steps that the device has finished; whether there was one."""
        ended = False
        while self._open_steps and self._open_steps[0][1].query():
            self._book.end_step(self._open_steps.popleft()[0])
            ended = True
        return ended


def _path(source: Delta | Fusion | str | Path, name: str | None) -> Path:
    """Of a tenant's file, for errors; a fusion that was read does not know its own."""
    if isinstance(source, Delta):
        return source.path
    return Path(name or "") if isinstance(source, Fusion) else Path(source)


def _slots(entries: Iterable[HeldTenant]) -> list[int]:
    """Of those that have one."""
    return [entry.slot for entry in entries if entry.slot is not None]


def _aligned_bytes(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] at an address that is a multiple of 256."""
    whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + size]
