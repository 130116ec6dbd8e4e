# SPDX-License-Identifier: Apache-2.0
"""An exported graph in onnx's ReferenceEvaluator, our ops being the torch reference ones over an arena on the host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from deltaweave.converter.export import MODEL_FILE, GraphManifest
from deltaweave.runtime_plugin.library import MAX_EXPERTS
from deltaweave.runtime_plugin.pytorch import Arena, ops
from deltaweave.runtime_plugin.pytorch.native import native_library
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

__all__ = ["ExportedGraph"]

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PLAN_TOKENS = 2048
Array = NDArray[Any]
# Arenas by the address of their memory: what an op is told by `arena_address`.
ARENAS: dict[int, torch.Tensor] = {}


def to_torch(array: Array) -> torch.Tensor:
    """Shares the array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: torch.Tensor) -> Array:
    """Shares the tensor's memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[.., features] as [tokens, features]."""
    return tensor.reshape(-1, tensor.shape[-1])


class _Op(OpRun):
    """What ours share: the arena's memory as bytes, and outputs written over copies of inputs."""

    op_domain = "deltaweave"

    def _run(self, *inputs: Array, plugin_version: str, plugin_namespace: str, **attributes: Any) -> tuple[Array, ...]:
        assert (plugin_version, plugin_namespace) == ("1", "deltaweave")
        outputs = self.compute([to_torch(array) for array in inputs], **attributes)
        return tuple(to_numpy(tensor) for tensor in outputs)


class DeltaweavePlan(_Op):
    def compute(self, inputs):
        slots, directory = inputs
        plan = torch.zeros(native_library().plan_bytes(PLAN_TOKENS) // 4, dtype=torch.int32)
        ops.plan(slots, directory.shape[1], plan)
        return [plan]


class DeltaweaveDeltaGemm(_Op):
    def compute(self, inputs, parameters, max_rank):
        x, *ys, plan, arena, directory = inputs
        ys = [y.clone() for y in ys]
        ops.delta_gemm(arena.view(torch.uint8), directory, plan, flat(x), [flat(y) for y in ys], parameters, max_rank)
        return ys


class DeltaweaveGate(_Op):
    def compute(self, inputs, parameter):
        x, slots, address, directory = inputs
        weights = torch.full((len(slots), MAX_EXPERTS), torch.nan)
        ops.gate(ARENAS[int(address)], directory, slots, flat(x), parameter, weights)
        return [weights]


class DeltaweaveGatedLora(_Op):
    def compute(self, inputs, parameters, max_rank):
        x, *ys, plan, arena, directory, weights = inputs
        ys = [y.clone() for y in ys]
        arena, rows = arena.view(torch.uint8), [flat(y) for y in ys]
        ops.gated_lora(arena, directory, plan, flat(x), rows, weights, parameters, max_rank)
        return ys


class DeltaweaveWeighedDelta(_Op):
    def compute(self, inputs, parameters, max_rank, expert):
        x, *ys, plan, arena, directory, weights = inputs
        ys = [y.clone() for y in ys]
        arena, rows, own = arena.view(torch.uint8), [flat(y) for y in ys], weights[:, expert]
        ops.delta_gemm(arena, directory, plan, flat(x), rows, parameters, max_rank, weights=own)
        return ys


class DeltaweaveDenseGemm(_Op):
    def compute(self, inputs, parameter, max_rank):
        x, y, plan, arena, directory = inputs
        y = y.clone()
        ops.dense_gemm(arena.view(torch.uint8), directory, plan, flat(x), flat(y), parameter, max_rank)
        return [y]


class DeltaweaveRmsNorm(_Op):
    def compute(self, inputs, parameter, epsilon):
        x, weight, slots, address, directory = inputs
        return [ops.rms_norm(ARENAS[int(address)], directory, slots, x, weight, epsilon, parameter)]


class DeltaweaveAddBias(_Op):
    def compute(self, inputs, parameters):
        *both, slots, arena, directory = inputs
        ys, biases = [y.clone() for y in both[: len(parameters)]], both[len(parameters) :]
        ops.add_bias(arena.view(torch.uint8), directory, slots, [flat(y) for y in ys], biases, parameters)
        return ys


class DeltaweaveEmbed(_Op):
    def compute(self, inputs, parameter):
        ids, table, slots, address, directory = inputs
        rows = ops.embed(ARENAS[int(address)], directory, slots, ids.reshape(-1), table, parameter)
        return [rows.view(*ids.shape, -1)]


OPS = [
    DeltaweavePlan,
    DeltaweaveDeltaGemm,
    DeltaweaveDenseGemm,
    DeltaweaveRmsNorm,
    DeltaweaveAddBias,
    DeltaweaveEmbed,
    DeltaweaveGate,
    DeltaweaveGatedLora,
    DeltaweaveWeighedDelta,
]


class ExportedGraph:
    """A graph, its tenants, and the cache of a batch of rows."""

    def __init__(self, folder: Path, manifest: GraphManifest, arena: Arena, tenants: Sequence[str | None]) -> None:
        """`tenants`: whose the rows are."""
        self._run = ReferenceEvaluator(str(folder / MODEL_FILE), new_ops=OPS)
        self._arena, self._tenants = arena, tenants
        ARENAS[arena.buffer.data_ptr()] = arena.buffer
        self._lengths = np.zeros(len(tenants), np.int64)
        cache = [tensor for tensor in manifest.inputs if tensor.name.startswith("past_")]
        dtype = NUMPY_DTYPES[manifest.dtype]
        self._cache = {t.name: np.zeros((len(tenants), *t.shape[1:]), dtype) for t in cache}
        self._delta_experts = manifest.delta_experts
        self._outputs = [tensor.name for tensor in manifest.outputs]

    def step(self, rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        """Reads more tokens of every row; the most likely next tokens int64 [batch], and logits [batch, vocabulary]."""
        lengths = np.array([len(row) for row in rows], np.int64)
        ids = np.zeros((len(rows), lengths.max()), np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        settings = self._arena.settings
        with self._arena.step(self._tenants) as slots:
            feeds = self._cache | {
                "input_ids": ids,
                "positions": self._lengths[:, None] + np.arange(ids.shape[1]),
                "lengths": self._lengths,
                "last": lengths - 1,
                "row_slots": np.array(slots, np.int32),
                "arena": self._arena.buffer.numpy().view(np.int64),
                "arena_address": np.array([self._arena.buffer.data_ptr()], np.int64),
                "directory": self._arena.directory.numpy(),
                "inverse_frequencies": settings.inverse_frequencies.numpy(),
                "rotary_scale": settings.rotary_scale.numpy(),
                "vocabulary": settings.vocabulary.numpy(),
            }
            if self._delta_experts:
                places = range(self._delta_experts)
                experts = [self._arena.expert_slots(self._tenants, place) for place in places]
                feeds["expert_slots"] = np.array(experts, np.int32)
            found = dict(zip(self._outputs, self._run.run(None, feeds), strict=True))
        self._lengths = self._lengths + lengths
        self._cache = {name: found[name.replace("past_", "present_")] for name in self._cache}
        return found["tokens"][:, 0], found["logits"]
