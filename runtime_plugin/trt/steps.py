# SPDX-License-Identifier: Apache-2.0
"""A step of an engine: an execution context for one shape, its inputs in one block of memory, its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from deltaweave.runtime_plugin.trt.arena import TenantArena
from deltaweave.runtime_plugin.trt.backend import Backend
from deltaweave.runtime_plugin.trt.builder import ARENA_WORD, MOST_ELEMENTS
from deltaweave.runtime_plugin.trt.manifest import GraphInfo
from deltaweave.runtime_plugin.trt.memory import ALIGNMENT, DeviceMemory, Graph, PinnedMemory, Stream
from numpy.typing import NDArray

__all__ = ["LoadedEngine", "Step", "runtime_config"]

WARMUP_STEPS = 2
# Inputs that the host writes for every step, as far as a graph has them.
HOST_INPUTS = ("input_ids", "positions", "lengths", "last", "row_slots", "expert_slots")


@dataclass(frozen=True)
class LoadedEngine:
    """A plan on the device, and the memory that all its steps share.

    Attributes:
        backend: TensorRT with the plugin.
        logger: of the runtime.
        engine: TensorRT's.
        graph: what the manifest says of it.
        arena: the tenants.
        cache: keys and values, [layer][key, value][row].
        rows: of the cache.
        stream: that steps run on.
        config: of execution contexts.
    """

    backend: Backend
    logger: Any
    engine: Any
    graph: GraphInfo
    arena: TenantArena
    cache: DeviceMemory
    rows: int
    stream: Stream
    config: Any

    def fixed_addresses(self) -> dict[str, int]:
        """Inputs that are the same for every step."""
        tables = self.arena.tables
        return {
            "arena": self.arena.buffer.address,
            "arena_address": self.arena.address.address,
            "directory": self.arena.directory.address,
            "inverse_frequencies": tables.frequencies.address,
            "rotary_scale": tables.scale.address,
            "vocabulary": tables.vocabulary.address,
        }

    def cache_address(self, name: str, row: int) -> int:
        """Where a row of past_key_3, present_value_3 or the like lies."""
        _, what, layer = name.split("_")
        plane = 2 * int(layer) + ("key", "value").index(what)
        return self.cache.address + (plane * self.rows + row) * self.graph.row_bytes

    def require(self, success: bool, what: str) -> None:
        """Raises what went wrong, in the plugin's words if it was the plugin."""
        if not success:
            raise self.backend.failure(what, self.logger)


class _Inputs:
    """What the host writes for a step: arrays in one pinned block, and its mirror on the device."""

    def __init__(self, graph: GraphInfo, batch: int, tokens: int) -> None:
        places, size = {}, 0
        for tensor in (each for each in graph.inputs if each.name in HOST_INPUTS):
            shape, dtype = tensor.dimensions(batch=batch, tokens=tokens), np.dtype(tensor.dtype)
            places[tensor.name] = (size, dtype, shape)
            nbytes = int(np.prod(shape)) * dtype.itemsize
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._size = size
        self._host, self._device = PinnedMemory((size,), np.uint8), DeviceMemory(size)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.addresses: dict[str, int] = {}
        for name, (start, dtype, shape) in places.items():
            stop = start + int(np.prod(shape)) * dtype.itemsize
            self.arrays[name] = self._host.array[start:stop].view(dtype).reshape(shape)
            self.addresses[name] = self._device.address + start

    def upload(self, stream: Stream) -> None:
        stream.upload(self._device.address, self._host.address, self._size)


class Step:
    """Steps of one shape, [batch, tokens]: inputs, execution, results, and the CUDA graph of all three.

    Attributes:
        inputs: arrays to be filled before `run`, by their names in the graph.
        tokens: int64 [batch], the most likely next token of every row, after the stream is synchronized.
    """

    def __init__(self, loaded: LoadedEngine, profile: int, batch: int, tokens: int) -> None:
        """Makes the context and its memory.

        Raises:
            EngineError: a shape that the engine was not built for, or that the plugin refuses.
        """
        self._loaded, self._batch = loaded, batch
        self._graph: Graph | None = None
        self._inputs = _Inputs(loaded.graph, batch, tokens)
        self.inputs = self._inputs.arrays
        vocabulary = loaded.graph.vocabulary
        self._tokens = PinnedMemory((batch,), np.int64)
        self._device_tokens = DeviceMemory(batch * 8)
        self._device_logits = DeviceMemory(batch * vocabulary * 4)
        self._logits: PinnedMemory | None = None
        self.tokens: NDArray[np.int64] = self._tokens.array
        self._context = loaded.engine.create_execution_context(loaded.config)
        loaded.require(self._context is not None, "no execution context")
        stream = loaded.stream
        loaded.require(self._context.set_optimization_profile_async(profile, stream.handle), f"profile {profile}")
        self._bind(batch, tokens)

    def _bind(self, batch: int, tokens: int) -> None:
        loaded, context = self._loaded, self._context
        words = min(loaded.arena.buffer.size // ARENA_WORD, MOST_ELEMENTS)
        fixed = loaded.fixed_addresses() | self._inputs.addresses
        for tensor in loaded.graph.inputs:
            if any(isinstance(size, str) for size in tensor.shape):
                shape = tensor.dimensions(batch=batch, tokens=tokens, arena_words=words)
                loaded.require(context.set_input_shape(tensor.name, shape), f"{tensor.name} of shape {shape}")
            if tensor.name in fixed:
                loaded.require(context.set_tensor_address(tensor.name, fixed[tensor.name]), tensor.name)
        for name, memory in (("logits", self._device_logits), ("tokens", self._device_tokens)):
            loaded.require(context.set_tensor_address(name, memory.address), name)
        self.aim(0)

    def aim(self, row: int) -> None:
        """Lets the step's first row be `row` of the cache."""
        graph = self._loaded.graph
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.name.startswith(("past_", "present_")):
                address = self._loaded.cache_address(tensor.name, row)
                self._loaded.require(self._context.set_tensor_address(tensor.name, address), tensor.name)

    def capture(self) -> None:
        """Captures the step as it is aimed now. Warming up computes the very step that follows, twice."""
        for _ in range(WARMUP_STEPS):
            self._queue()
        self._loaded.stream.synchronize()
        self._graph = Graph(self._loaded.stream, self._queue)
        self._loaded.arena.acquire_graph()

    @property
    def captured(self) -> bool:
        """Whether it has a graph."""
        return self._graph is not None

    def run(self) -> None:
        """Queues the step with the inputs as they are now, and the copy of its tokens."""
        if self._graph is not None:
            self._graph.launch(self._loaded.stream)
        else:
            self._queue()

    def logits(self) -> NDArray[np.float32]:
        """Float32 [batch, vocabulary] of the last step; waits for it."""
        if self._logits is None:
            self._logits = PinnedMemory((self._batch, self._loaded.graph.vocabulary), np.float32)
        array: NDArray[np.float32] = self._logits.array
        self._loaded.stream.download(self._logits.address, self._device_logits.address, array.nbytes)
        self._loaded.stream.synchronize()
        return array

    def close(self) -> None:
        """Gives the graph up."""
        if self._graph is not None:
            self._graph.destroy()
            self._graph = None
            self._loaded.arena.release_graph()

    def _queue(self) -> None:
        stream = self._loaded.stream
        self._inputs.upload(stream)
        self._loaded.require(self._context.execute_async_v3(stream.handle), "the step failed")
        stream.download(self._tokens.address, self._device_tokens.address, self._batch * 8)


def runtime_config(backend: Backend, engine: Any, cache_file: Path | None) -> tuple[Any, Any]:
    """The configuration of execution contexts, and RTX's cache of compiled kernels (None elsewhere)."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(backend.api.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
    if not backend.is_rtx:
        return config, None
    # Kernels for a shape are compiled before its first step, not while later ones run.
    strategies = backend.api.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    cache = config.create_runtime_cache()
    if cache_file is not None and cache_file.is_file():
        cache.deserialize(cache_file.read_bytes())
    config.set_runtime_cache(cache)
    return config, cache
