# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes and fusions for an engine: what they change of the base that the engine holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from deltaweave.formats import Delta, DeltaExpert, Fusion
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.fit import AttachError, generation_settings, require_vocabulary, tuned_config
from deltaweave.runtime_plugin.fusions import expert_records, fusion_records, gated_blocks, require_fusion
from deltaweave.runtime_plugin.records import ServedRecord
from deltaweave.runtime_plugin.tables import EMBEDDING, HEAD, served_records
from deltaweave.runtime_plugin.trt.manifest import GraphInfo
from numpy.typing import NDArray
from transformers import GenerationConfig, PretrainedConfig

__all__ = ["EngineBase", "Tenant", "load_fusion", "load_tenant", "rotary_frequencies"]


@dataclass(frozen=True)
class EngineBase:
    """The base behind an engine: its settings are there, its values are not."""

    tied: bool

    def same(self, alias: str, owner: str) -> bool:
        """Whether both names are one tensor of the base."""
        return alias == owner or (self.tied and {alias, owner} == {EMBEDDING, HEAD})

    def read(self, name: str) -> NDArray[np.float32]:
        """Engines keep no weights that could be read.

        Raises:
            AttachError: always.
        """
        raise AttachError(
            f"{name}: the fine-tune ties it to another parameter and the base does not, which an engine cannot serve; "
            "compress it with untied weights"
        )


@dataclass(frozen=True)
class Tenant:
    """A fine-tune or a fusion that an engine can serve.

    Attributes:
        name: what requests call it.
        path: of its file.
        records: what it changes.
        vocabulary: its number of tokens.
        inverse_frequencies: of its rotary embedding, float32 [head_dim / 2].
        rotary_scale: what that embedding's sines and cosines are multiplied with.
        generation: its own generation settings, if it brings some.
        experts: of a fusion, tenants of their own by the expert's place: those that are deltas.
    """

    name: str
    path: Path
    records: tuple[ServedRecord, ...]
    vocabulary: int
    inverse_frequencies: NDArray[np.float32]
    rotary_scale: float
    generation: GenerationConfig | None = None
    experts: Mapping[int, Tenant] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> list[library.Record]:
        """Of its records, as the library wants them."""
        return [record.shape() for record in self.records]


def load_tenant(graph: GraphInfo, base: PretrainedConfig, delta: Delta, name: str) -> Tenant:
    """Reads a delta as a tenant; large parts stay views of the file. Whose base it is, the caller has checked.

    Args:
        graph: of the engine.
        base: configuration of the engine's base.
        delta: open.
        name: what requests call it.

    Raises:
        AttachError: another family, or something that an engine does not serve.
    """
    tuned = tuned_config(base, delta)
    require_vocabulary(delta, tuned)
    if tuned.vocab_size > graph.vocabulary:
        raise AttachError(
            f"{delta.path}: a vocabulary of {tuned.vocab_size}, the engine takes up to {graph.vocabulary}; build it "
            f"with --vocabulary {tuned.vocab_size}"
        )
    frequencies, scale = np.array(graph.inverse_frequencies, np.float32), graph.rotary_scale
    if tuned.rope_parameters != base.rope_parameters:
        frequencies, scale = rotary_frequencies(tuned.rope_parameters, graph.head_dim, str(delta.path))
    return Tenant(
        name=name,
        path=delta.path,
        records=tuple(served_records(graph.table(), delta, EngineBase(graph.tied))),
        vocabulary=int(tuned.vocab_size),
        inverse_frequencies=frequencies,
        rotary_scale=scale,
        generation=generation_settings(delta),
    )


def load_fusion(graph: GraphInfo, base: PretrainedConfig, fusion: Fusion, name: str, path: Path) -> Tenant:
    """Reads a fusion as a tenant, its experts that are deltas as tenants of their own.

    Args:
        graph: of the engine.
        base: configuration of the engine's base.
        fusion: with what it names in other files at hand (`resolve_fusion`). Whose base it is, the caller has checked.
        name: what requests call it.
        path: of its file, for errors.

    Raises:
        AttachError: another family, a gate for another model, or something that this engine was not built for.
    """
    require_fusion(fusion, base.model_type)
    deltas = {place: expert for place, expert in enumerate(fusion.experts) if isinstance(expert, DeltaExpert)}
    if not graph.fusions:
        raise AttachError(f"{path}: a fusion, and the engine was built without them; build it with --fusions")
    if deltas and max(deltas) >= graph.delta_experts:
        raise AttachError(
            f"{path}: its expert {max(deltas)} is a delta, and in the engine {graph.delta_experts or 'none'} of the "
            f"first may be; build it with --delta-experts {max(deltas) + 1}"
        )
    table = graph.table()

    def tenant(own: str, records: Iterable[ServedRecord], experts: Mapping[int, Tenant]) -> Tenant:
        return Tenant(
            name=own,
            path=path,
            records=tuple(records),
            vocabulary=graph.base_vocabulary,
            inverse_frequencies=np.array(graph.inverse_frequencies, np.float32),
            rotary_scale=graph.rotary_scale,
            experts=experts,
        )

    experts = {
        place: tenant(f"{name}/{expert.name}", expert_records(table, expert.delta), {})
        for place, expert in deltas.items()
    }
    return tenant(name, fusion_records(table, gated_blocks(table), fusion), experts)


def rotary_frequencies(settings: dict[str, Any], head_dim: int, name: str) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies [head_dim / 2] and scale of a rotary embedding, as Transformers computes them.

    Raises:
        AttachError: a kind other than default, linear and llama3.
    """
    kind = settings["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise AttachError(
            f"{name}: rotary embedding {kind}, which differs from the base's, cannot be served by an engine"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(settings["rope_theta"]) ** exponents)).astype(np.float32)
    if kind == "linear":
        frequencies = (frequencies / np.float32(settings["factor"])).astype(np.float32)
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings)
    return frequencies, 1.0


def _llama3(frequencies: NDArray[np.float32], settings: dict[str, Any]) -> NDArray[np.float32]:
    """Long waves are slowed down, short ones kept, and those between blended."""
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    old = settings["original_max_position_embeddings"]
    waves = 2 * math.pi / frequencies
    slowed = np.where(waves > old / low, frequencies / factor, frequencies)
    smooth = (old / waves - low) / (high - low)
    blended = (1 - smooth) * slowed / factor + smooth * slowed
    between = ~(waves < old / high) & ~(waves > old / low)
    return np.where(between, blended, slowed).astype(np.float32)
