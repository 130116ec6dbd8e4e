# SPDX-License-Identifier: Apache-2.0
"""A base checkpoint to an engine folder: exporter and builder joined, and the files that a tokenizer needs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from deltaweave import __version__
from deltaweave.converter import Checkpoint, Progress
from deltaweave.converter.export import MODEL_FILE, ExportOptions, export_decoder
from deltaweave.converter.packaging import CARRIED_FILES
from deltaweave.runtime_plugin.trt.backend import PLUGIN_VERSION, Backend, load_backend
from deltaweave.runtime_plugin.trt.builder import build_plan, current_capability, require_capabilities
from deltaweave.runtime_plugin.trt.folder import replaced_folder, write_plan
from deltaweave.runtime_plugin.trt.manifest import (
    MANIFEST_FILE,
    BaseInfo,
    Capacities,
    EngineManifest,
    GraphInfo,
    PlanInfo,
    SoftwareInfo,
)

__all__ = ["CURRENT", "EngineOptions", "build_engine"]

CURRENT = "current"
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built for.

    Attributes:
        capabilities: compute capabilities ("8.9"), or "current" for the GPU at hand.
        dtype: of weights, activations and cache; None for float16 if the base has it throughout, else bfloat16.
        max_batch: rows of a decode step.
        max_tokens: of one prefill step; longer prompts go in chunks.
        max_sequence: prompt and continuation of a row.
        max_tenants: fine-tunes that may be resident at a time.
        max_rank: largest rank of a fine-tune's record; None for what the base's shapes allow.
        vocabulary: most tokens of a fine-tune; None for the base's and some more.
        fusions: with gates and LoRAs of fusions, which cost every step some launches.
        delta_experts: how many of a fusion's first experts may be deltas, each at the price of a delta more.
        arena_bytes: device memory for fine-tunes that a runner takes unless told otherwise.
    """

    capabilities: Sequence[str] = (CURRENT,)
    dtype: Literal["float16", "bfloat16"] | None = None
    max_batch: int = 32
    max_tokens: int = 2048
    max_sequence: int = 4096
    max_tenants: int = 64
    max_rank: int | None = None
    vocabulary: int | None = None
    fusions: bool = False
    delta_experts: int = 0
    arena_bytes: int = 8 << 30


def build_engine(
    base: str | Path,
    output: str | Path,
    options: EngineOptions,
    *,
    progress: Progress = lambda description, done, total: None,
    write: Callable[[str], None] | None = None,
) -> EngineManifest:
    """Builds an engine folder; it appears whole or not at all.

    Args:
        base: Hugging Face folder of the base.
        output: the engine folder; an older engine there is replaced.
        options: see there.
        progress: called with (what, done, total).
        write: is handed notes: TensorRT's name, its warnings.

    Raises:
        DeltaweaveError: a base that cannot be exported, a capability that this TensorRT does not build for, a build
            that failed, or an output that is no engine folder.
    """
    backend, checkpoint, folder = load_backend(), Checkpoint.open(base), Path(output)
    say = write or (lambda note: None)
    say(f"{backend.name} {backend.version}, plugin {backend.plugin}")
    require_capabilities(backend, options.capabilities)
    capacities = Capacities(
        max_batch=options.max_batch,
        max_tokens=min(options.max_tokens, options.max_sequence),
        arena_bytes=options.arena_bytes,
    )
    with replaced_folder(folder) as temporary, tempfile.TemporaryDirectory(dir=temporary) as scratch:
        graph = _export(checkpoint, Path(scratch), options, progress)
        timing = temporary / TIMING_CACHE
        if (folder / TIMING_CACHE).is_file():
            shutil.copyfile(folder / TIMING_CACHE, timing)
        plans: dict[str, PlanInfo] = {}
        for capability in options.capabilities:
            plan = build_plan(
                backend,
                Path(scratch) / MODEL_FILE,
                graph,
                capacities,
                capability=capability,
                timing_cache=None if backend.is_rtx else timing,
                progress=progress,
                write=say,
            )
            name = current_capability() if capability == CURRENT else capability
            plans[name] = write_plan(temporary, name, plan)
        for name in CARRIED_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, temporary / name)
        manifest = EngineManifest(
            software=_software(backend),
            base=_identity(checkpoint, progress),
            capacities=capacities,
            graph=graph,
            plans=plans,
        )
        (temporary / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1))
    return manifest


def _export(checkpoint: Checkpoint, folder: Path, options: EngineOptions, progress: Progress) -> GraphInfo:
    exported = export_decoder(
        checkpoint,
        folder,
        ExportOptions(
            dtype=options.dtype or _dtype(checkpoint),
            max_sequence=options.max_sequence,
            slots=options.max_tenants,
            max_rank=options.max_rank,
            vocabulary=options.vocabulary,
            fusions=options.fusions,
            delta_experts=options.delta_experts,
        ),
        lambda done, total: progress("exporting", done, total),
    )
    return GraphInfo.model_validate(exported.model_dump())


def _software(backend: Backend) -> SoftwareInfo:
    return SoftwareInfo(
        deltaweave=__version__,
        backend=backend.name,
        backend_version=backend.version,
        plugin_version=PLUGIN_VERSION,
        plugin_sha256=backend.plugin_digest(),
    )


def _identity(checkpoint: Checkpoint, progress: Progress) -> BaseInfo:
    identity = checkpoint.identity(lambda done, total: progress("hashing the base", done, total))
    return BaseInfo(name=identity.name, root=identity.root, fingerprint=identity.fingerprint)


def _dtype(checkpoint: Checkpoint) -> Literal["float16", "bfloat16"]:
    halves = {checkpoint.dtype(name) for name in checkpoint.names} == {torch.float16}
    return "float16" if halves else "bfloat16"
