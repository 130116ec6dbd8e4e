# SPDX-License-Identifier: Apache-2.0
"""What an engine folder says of itself: manifest.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from deltaweave.runtime_plugin.library import ParameterKind
from deltaweave.runtime_plugin.tables import BaseParameter, Table
from deltaweave.runtime_plugin.trt.errors import EngineError
from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = [
    "MANIFEST_FILE",
    "BaseInfo",
    "Capacities",
    "EngineManifest",
    "GraphInfo",
    "ParameterInfo",
    "PlanInfo",
    "SoftwareInfo",
    "TensorInfo",
]

MANIFEST_FILE = "manifest.json"
KINDS = {kind: ParameterKind[kind.upper()] for kind in ("linear", "embedding", "vector", "gate")}
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorInfo(_Strict):
    """An input or output; a dimension is a number, or the name of one that a step chooses."""

    name: str
    dtype: Literal["float16", "bfloat16", "float32", "int32", "int64"]
    shape: tuple[int | str, ...]

    def dimensions(self, **chosen: int) -> tuple[int, ...]:
        """The shape with its names replaced."""
        return tuple(chosen[size] if isinstance(size, str) else size for size in self.shape)


class ParameterInfo(_Strict):
    """A parameter of the base that fine-tunes may change, in the directory's order."""

    name: str
    kind: Literal["linear", "embedding", "vector", "gate"]
    shape: tuple[int, ...]
    rows: int


class GraphInfo(_Strict):
    """The exported graph.

    Attributes:
        dtype: of activations, weights and the cache.
        layers: decoder blocks.
        kv_heads: heads of the cache.
        head_dim: features of each.
        max_sequence: tokens that a row of the cache holds.
        max_rank: largest rank of a fine-tune's record.
        slots: fine-tunes that may be resident at a time.
        fusions: whether it has gates, and adds the LoRAs of fusions.
        delta_experts: how many of a fusion's first experts may be deltas.
        vocabulary: width of the logits, the most tokens that a fine-tune may have.
        base_vocabulary: the base's.
        tied: whether the base's lm_head is its embedding.
        inverse_frequencies: of the base's rotary embedding, [head_dim / 2].
        rotary_scale: what its sines and cosines are multiplied with.
        parameters: rows of the directory.
        inputs: of the graph.
        outputs: of the graph.
    """

    dtype: Literal["float16", "bfloat16"]
    layers: int
    kv_heads: int
    head_dim: int
    max_sequence: int
    max_rank: int
    slots: int
    fusions: bool
    delta_experts: int
    vocabulary: int
    base_vocabulary: int
    tied: bool
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float
    parameters: tuple[ParameterInfo, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def table(self) -> Table:
        """What fine-tunes may change."""
        entries = {
            parameter.name: BaseParameter(index, KINDS[parameter.kind], parameter.shape, parameter.rows)
            for index, parameter in enumerate(self.parameters)
        }
        return Table(entries, self.vocabulary)

    def cache_bytes(self, rows: int) -> int:
        """Bytes of the KV cache of so many rows."""
        return rows * 2 * self.layers * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer's keys, or values."""
        return self.kv_heads * self.max_sequence * self.head_dim * ELEMENT_BYTES[self.dtype]


class Capacities(_Strict):
    """What the engine was built for; the sequence length is the graph's, and so are tenants (slots)."""

    max_batch: int
    max_tokens: int
    arena_bytes: int


class BaseInfo(_Strict):
    """The checkpoint whose weights the plans hold; `root` and `fingerprint` as in a delta's header."""

    name: str
    root: str
    fingerprint: str


class SoftwareInfo(_Strict):
    """What built the engine."""

    deltaweave: str
    backend: Literal["tensorrt", "tensorrt_rtx"]
    backend_version: str
    plugin_version: str
    plugin_sha256: str


class PlanInfo(_Strict):
    """One plan: a file for one compute capability."""

    file: str
    bytes: int
    sha256: str


class EngineManifest(_Strict):
    """The whole; `plans` by compute capability ("8.9")."""

    format: Literal[1] = 1
    software: SoftwareInfo
    base: BaseInfo
    capacities: Capacities
    graph: GraphInfo
    plans: dict[str, PlanInfo]

    @classmethod
    def read(cls, folder: Path) -> EngineManifest:
        """The manifest of a folder.

        Raises:
            EngineError: no engine folder, or a manifest that is damaged or of another version.
        """
        file = folder / MANIFEST_FILE
        if not file.is_file():
            raise EngineError(f"{folder}: no {MANIFEST_FILE}, so this is no engine folder")
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise EngineError(f"{file}: {place}: {first['msg']}") from error
