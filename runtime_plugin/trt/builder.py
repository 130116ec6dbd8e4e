# SPDX-License-Identifier: Apache-2.0
"""From an exported graph to a TensorRT plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaweave.runtime_plugin.library import MAX_TOKENS
from deltaweave.runtime_plugin.trt.backend import Backend
from deltaweave.runtime_plugin.trt.errors import EngineError
from deltaweave.runtime_plugin.trt.manifest import Capacities, GraphInfo
from deltaweave.runtime_plugin.trt.memory import compute_capability

__all__ = ["DECODE", "PREFILL", "build_plan", "capabilities", "current_capability", "require_capabilities"]

# Optimisation profiles, in this order: a row's prompt, and one token of every row.
PREFILL, DECODE = 0, 1
# A TensorRT tensor's most elements; of a larger arena the shape tells only so much, and the plugin needs the address.
MOST_ELEMENTS = (1 << 31) - 1
ARENA_WORD = 8
CURRENT = "current"

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class _Sizes:
    """Least, usual and most of a named dimension."""

    least: int
    usual: int
    most: int


def capabilities(backend: Backend) -> list[str]:
    """The compute capabilities that this TensorRT builds for without such a GPU."""
    if not backend.is_rtx:
        return []
    names = [name for name in dir(backend.api.ComputeCapability) if name.startswith("SM")]
    return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=lambda text: [int(p) for p in text.split(".")])


def current_capability() -> str:
    """The GPU's compute capability.

    Raises:
        EngineError: there is no GPU.
    """
    return compute_capability()


def require_capabilities(backend: Backend, wanted: Sequence[str]) -> None:
    """Refuses compute capabilities that this TensorRT does not build for, before anything is exported.

    Raises:
        EngineError: none at all, or one that is unknown, given twice, or needs a GPU that is not there.
    """
    if not wanted or len(set(wanted)) != len(wanted):
        raise EngineError(f"compute capabilities {', '.join(wanted) or 'none'}, expected each once and at least one")
    for capability in wanted:
        _capability_name(backend, capability)
        if capability == CURRENT:
            current_capability()


def build_plan(
    backend: Backend,
    model: Path,
    graph: GraphInfo,
    capacities: Capacities,
    *,
    capability: str,
    timing_cache: Path | None = None,
    progress: Progress = lambda description, done, total: None,
    write: Callable[[str], None] | None = None,
) -> bytes:
    """Builds a plan with a prefill and a decode profile, strongly typed.

    Args:
        backend: TensorRT with the plugin.
        model: the ONNX file; weights beside it.
        graph: what the exporter says of it.
        capacities: the largest step.
        capability: "8.9", or "current" for the GPU at hand.
        timing_cache: read if there, and written.
        progress: called with (what, done, total).
        write: is handed TensorRT's warnings.

    Raises:
        EngineError: a capability that this TensorRT does not build for, a graph that it does not take, or a build that
            failed; the message is TensorRT's or the plugin's.
    """
    _require_capacities(graph, capacities)
    api, logger = backend.api, backend.logger(write)
    backend.take_error()
    builder = api.Builder(logger)
    network = builder.create_network(_flags(api))
    parser = api.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        logger.messages[:0] = reasons
        raise backend.failure(f"{model.name} was refused", logger)
    _let_attention_decompose(api, network)
    config = builder.create_builder_config()
    _set_capability(backend, config, capability)
    config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(api, progress)
    for sizes in profiles(graph, capacities):
        config.add_optimization_profile(_profile(builder, graph, sizes))
    cache = _timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise backend.failure(f"no plan for compute capability {capability}", logger)
    if timing_cache is not None and cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def profiles(graph: GraphInfo, capacities: Capacities) -> Sequence[Mapping[str, _Sizes]]:
    """The named dimensions' sizes by profile."""
    words = min(max(capacities.arena_bytes // ARENA_WORD, 32), MOST_ELEMENTS)
    one, arena = _Sizes(1, 1, 1), _Sizes(32, words, MOST_ELEMENTS)
    tokens = _Sizes(1, min(capacities.max_tokens, 128), capacities.max_tokens)
    batch = _Sizes(1, capacities.max_batch, capacities.max_batch)
    return [
        {"batch": one, "tokens": tokens, "arena_words": arena},
        {"batch": batch, "tokens": one, "arena_words": arena},
    ]


def _require_capacities(graph: GraphInfo, capacities: Capacities) -> None:
    for name, value in (("max_batch", capacities.max_batch), ("max_tokens", capacities.max_tokens)):
        if not 1 <= value <= MAX_TOKENS:
            raise EngineError(f"{name} {value}, expected 1 to {MAX_TOKENS}")
    if capacities.max_tokens > graph.max_sequence:
        raise EngineError(f"max_tokens {capacities.max_tokens} in a sequence of at most {graph.max_sequence}")


def _let_attention_decompose(api: Any, network: Any) -> None:
    """Attention for which a GPU has no fused kernel is computed from plain products instead of refused."""
    kind = getattr(api.LayerType, "ATTENTION_INPUT", None)
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == kind:
            layer.__class__ = api.IAttentionInputLayer  # layers come as their base class
            layer.attention.decomposable = True


def _flags(api: Any) -> int:
    """Every network is strongly typed from TensorRT 11 on, where the flag is gone."""
    flag = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _capability_name(backend: Backend, capability: str) -> str:
    """The name of a capability in TensorRT's Python interface."""
    name = "CURRENT" if capability == CURRENT else "SM" + capability.replace(".", "")
    known = capabilities(backend)
    if capability != CURRENT and capability not in known:
        raise EngineError(
            f"compute capability {capability}: {backend.name} {backend.version} builds for "
            f"{', '.join([*known, CURRENT])}"
        )
    return name


def _set_capability(backend: Backend, config: Any, capability: str) -> None:
    name = _capability_name(backend, capability)
    if backend.is_rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(backend.api.ComputeCapability, name), 0)


def _profile(builder: Any, graph: GraphInfo, sizes: Mapping[str, _Sizes]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in graph.inputs:
        if all(isinstance(size, int) for size in tensor.shape):
            continue
        shapes = [
            tensor.dimensions(**{name: getattr(size, which) for name, size in sizes.items()})
            for which in ("least", "usual", "most")
        ]
        profile.set_shape(tensor.name, *shapes)
    return profile


def _timing_cache(config: Any, file: Path | None) -> Any:
    """Kept where TensorRT measures kernels; a build ahead of time measures none, and takes no cache."""
    if file is None:
        return None
    content = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(content)
    return cache if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False) else None


def _monitor(api: Any, progress: Progress) -> Any:
    """TensorRT's phases as progress; only outermost ones are told."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]  # the module is chosen at run time
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.totals:
                progress(phase_name, step + 1, max(self.totals[phase_name], 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()
