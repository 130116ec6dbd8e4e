# SPDX-License-Identifier: Apache-2.0
"""The engine folder: plans, manifest, tokenizer and settings; whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltaweave.formats import BaseIdentity
from deltaweave.runtime_plugin.trt.backend import PLUGIN_VERSION, Backend
from deltaweave.runtime_plugin.trt.errors import EngineError
from deltaweave.runtime_plugin.trt.manifest import MANIFEST_FILE, EngineManifest, PlanInfo

__all__ = ["EngineFolder", "plan_file", "replaced_folder", "write_plan"]

PARTIAL = ".partial"


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place once the block has ended, and not if it fails.

    Raises:
        EngineError: something stands there that is no engine folder.
    """
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise EngineError(f"{output}: is there already and no engine folder; give another name or remove it")
    temporary, old = output.with_name(output.name + PARTIAL), output.with_name(output.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(temporary)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def plan_file(capability: str) -> str:
    """Name of a capability's plan."""
    return f"sm{capability.replace('.', '')}.plan"


def write_plan(folder: Path, capability: str, plan: bytes) -> PlanInfo:
    """Writes a plan into a folder, and says what the manifest keeps of it."""
    name = plan_file(capability)
    (folder / name).write_bytes(plan)
    return PlanInfo(file=name, bytes=len(plan), sha256=hashlib.sha256(plan).hexdigest())


@dataclass(frozen=True)
class EngineFolder:
    """An engine folder that was opened."""

    path: Path
    manifest: EngineManifest

    @classmethod
    def open(cls, path: Path | str) -> EngineFolder:
        """Reads the manifest.

        Raises:
            EngineError: no engine folder, a damaged manifest, or plans that are missing or of another size.
        """
        folder = Path(path)
        if folder.name.endswith(PARTIAL):
            raise EngineError(f"{folder}: a build that did not finish")
        opened = cls(folder, EngineManifest.read(folder))
        for info in opened.manifest.plans.values():
            found = folder / info.file
            size = found.stat().st_size if found.is_file() else -1
            if size != info.bytes:
                came = "is missing" if size < 0 else f"has {size} bytes"
                raise EngineError(f"{found}: {came}, the manifest says {info.bytes}")
        return opened

    def plan(self, capability: str, backend: Backend) -> bytes:
        """The plan for a GPU, if this software may run it.

        Raises:
            EngineError: none for this compute capability, built by another TensorRT or for another plugin, or damaged.
        """
        software, plans = self.manifest.software, self.manifest.plans
        if (software.backend, software.backend_version) != (backend.name, backend.version):
            raise EngineError(
                f"{self.path}: built by {software.backend} {software.backend_version}, this is {backend.name} "
                f"{backend.version}; build it again"
            )
        if software.plugin_version != PLUGIN_VERSION:
            raise EngineError(
                f"{self.path}: built for plugin version {software.plugin_version}, this is {PLUGIN_VERSION}; build it "
                "again"
            )
        if capability not in plans:
            raise EngineError(
                f"{self.path}: no plan for compute capability {capability}, there are {', '.join(sorted(plans))}"
            )
        info = plans[capability]
        content = (self.path / info.file).read_bytes()
        if hashlib.sha256(content).hexdigest() != info.sha256:
            raise EngineError(f"{self.path / info.file}: its SHA-256 is not the manifest's")
        return content

    def require_base(self, base: BaseIdentity, name: str) -> None:
        """Refuses a fine-tune of another base.

        Raises:
            EngineError: the fingerprints differ.
        """
        own = self.manifest.base
        if base.fingerprint != own.fingerprint:
            raise EngineError(
                f"{name}: made from base {base.name} (root {base.root[:12]}), the engine holds {own.name} "
                f"({own.root[:12]}); accept_base takes it all the same"
            )


def _sync(folder: Path) -> None:
    """Flushes every file and the folder."""
    for path in _below(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _below(folder: Path) -> Iterable[Path]:
    yield from folder.rglob("*")
    yield folder
