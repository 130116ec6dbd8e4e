# SPDX-License-Identifier: Apache-2.0
"""A worker's counts of its tenants, and their way into the API server's Prometheus page: a small file. No vLLM here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

__all__ = ["TenantCollector", "TenantCounts", "counts_file", "remove_at_exit"]


def counts_file(instance: str) -> Path:
    """Where the first worker of a vLLM instance keeps its counts; every process knows the instance's name."""
    return Path(tempfile.gettempdir()) / f"deltaweave-vllm-{os.getuid()}-{instance}.json"


def remove_at_exit(file: Path) -> None:
    """When this process ends, unless it is killed; also one that multiprocessing started, where atexit does nothing."""
    Finalize(None, file.unlink, kwargs={"missing_ok": True}, exitpriority=0)


@dataclass
class TenantCounts:
    """What has happened so far.

    Attributes:
        resident: tenants on the device.
        held: tenants in host memory.
        loads: files read.
        load_seconds: spent reading them, in all.
        uploads: from host memory to the device.
        evictions: off the device, whether to make room or for good.
        file: that others read; None for none.
    """

    resident: int = 0
    held: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    uploads: int = 0
    evictions: int = 0
    file: Path | None = None

    def loaded(self, seconds: float) -> None:
        """A tenant's file was read."""
        self.loads += 1
        self.load_seconds += seconds
        self._write()

    def standing(self, resident: int, held: int, uploads: int, evictions: int) -> None:
        """How things are now; written only when they have changed."""
        now = (resident, held, uploads, evictions)
        if now != (self.resident, self.held, self.uploads, self.evictions):
            self.resident, self.held, self.uploads, self.evictions = now
            self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        values = {name: value for name, value in asdict(self).items() if name != "file"}
        fresh = self.file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # a full disk costs the metrics, not the step
            fresh.write_text(json.dumps(values))
            fresh.replace(self.file)


class TenantCollector:
    """A Prometheus collector that reads the counts when it is asked, and takes their file away at the process's end."""

    def __init__(self, instance: str, model: str) -> None:
        """`model`: the label that vLLM's own metrics have."""
        self._file, self._model = counts_file(instance), model
        remove_at_exit(self._file)

    def collect(self) -> Iterator[Any]:
        """One family of samples a count; none before there is a worker."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        try:
            counts = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return
        for name, (kind, key, text) in {
            "deltaweave:tenants_resident": (GaugeMetricFamily, "resident", "Tenants on the device."),
            "deltaweave:tenants_held": (GaugeMetricFamily, "held", "Tenants in host memory."),
            "deltaweave:tenant_loads": (CounterMetricFamily, "loads", "Tenants read from files."),
            "deltaweave:tenant_load_seconds": (CounterMetricFamily, "load_seconds", "Spent reading tenants' files."),
            "deltaweave:tenant_uploads": (CounterMetricFamily, "uploads", "Tenants brought to the device."),
            "deltaweave:tenant_evictions": (CounterMetricFamily, "evictions", "Tenants taken off the device."),
        }.items():
            family = kind(name, text, labels=["model_name"])
            family.add_metric([self._model], counts[key])
            yield family
