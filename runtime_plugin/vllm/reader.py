# SPDX-License-Identifier: Apache-2.0
"""Tenants' files, read by a thread of their own beside a worker's steps. No vLLM here."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from deltaweave.runtime_plugin.pytorch.arena import ArenaError, HeldTenant

__all__ = ["Adapter", "TenantReader"]


@dataclass(frozen=True)
class Adapter:
    """What a request says of its tenant.

    Attributes:
        id: that vLLM gave it, above 0; another one for every time that a name is loaded.
        name: the model's name in a request.
        path: of its file.
    """

    id: int
    name: str
    path: str

    def require_same(self, other: Adapter) -> None:
        """For two of one id.

        Raises:
            ArenaError: they are two tenants.
        """
        if self != other:
            raise ArenaError(
                f"adapter {self.id} is {self.name!r} and was to be {other.name!r} of {other.path} too: unload a model "
                "before its name is loaded again, run one API server, give every LoRARequest an id of its own"
            )


@dataclass
class _Reading:
    adapter: Adapter
    tenant: Future[HeldTenant]
    seconds: float = 0.0


class TenantReader:
    """What is being read, and what was and is not dropped yet. All of it may be called by any thread."""

    def __init__(self, read: Callable[[Adapter], HeldTenant]) -> None:
        """`read`: brings a tenant to host memory, or says why it cannot be served."""
        self._read = read
        self._readings: dict[int, _Reading] = {}
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltaweave-reader")

    def begin(self, adapter: Adapter) -> Future[HeldTenant]:
        """Reads a tenant; once, however often it is asked for before it is dropped. One that failed is tried again.

        Raises:
            ArenaError: the id is another tenant's.
        """
        return self._begun(adapter).tenant

    def wait(self, adapter: Adapter) -> tuple[HeldTenant, float]:
        """The tenant and the seconds that its reading took."""
        reading = self._begun(adapter)
        return reading.tenant.result(), reading.seconds

    def finished(self) -> list[Adapter]:
        """Those that nobody has to wait for."""
        with self._lock:
            readings = list(self._readings.values())
        return [reading.adapter for reading in readings if reading.tenant.done() and not _failed(reading)]

    def drop(self, adapter_id: int) -> bool:
        """Nobody wants it any more; waits for what is being read. Whether there was one, and it did not fail."""
        with self._lock:
            reading = self._readings.pop(adapter_id, None)
        return reading is not None and reading.tenant.exception() is None

    def _begun(self, adapter: Adapter) -> _Reading:
        with self._lock:
            reading = self._readings.get(adapter.id)
            if reading is None or _failed(reading):
                reading = self._readings[adapter.id] = _Reading(adapter, Future())
                self._thread.submit(self._run, reading)
            reading.adapter.require_same(adapter)
            return reading

    def _run(self, reading: _Reading) -> None:
        began = time.monotonic()
        try:
            tenant = self._read(reading.adapter)
        except Exception as error:
            reading.tenant.set_exception(error)
            return
        reading.seconds = time.monotonic() - began
        reading.tenant.set_result(tenant)


def _failed(reading: _Reading) -> bool:
    return reading.tenant.done() and reading.tenant.exception() is not None
