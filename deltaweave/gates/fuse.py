# SPDX-License-Identifier: Apache-2.0
"""Fusions that need no training: experts with weights that somebody chose, or with a gate that LoRA-Flow released."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from deltaweave.converter.lora import read_loraflow_gate
from deltaweave.formats.fusion import FixedGate, TokenGate
from deltaweave.gates.baselines import average_weights
from deltaweave.gates.build import Parts
from deltaweave.gates.experts import GateError

__all__ = ["fuse"]


def fuse(
    parts: Parts,
    *,
    weights: Sequence[float] | None = None,
    gate: str | Path | None = None,
    temperature: float = 1.0,
    force: bool = False,
) -> FixedGate | TokenGate:
    """Writes a fusion of opened experts, and returns what weighs them.

    Args:
        parts: base, experts, output.
        weights: one an expert, the same for every layer and token; None for the average.
        gate: file of LoRA-Flow's gates, in place of weights.
        temperature: of that gate; its files hold none.
        force: replace an existing output.

    Raises:
        DeltaweaveError: both or the wrong number of weights, a gate of another shape, an expert of another base.
    """
    _require_modules(parts)
    chosen = _fixed(parts, weights) if gate is None else _released(parts, Path(gate), weights, temperature)
    parts.write(chosen, {"name": "fixed" if gate is None else "lora-flow"}, None, force=force)
    return chosen


def _fixed(parts: Parts, weights: Sequence[float] | None) -> FixedGate:
    count = len(parts.experts)
    chosen = average_weights(count) if weights is None else tuple(map(float, weights))
    if len(chosen) != count:
        raise GateError(f"{len(chosen)} weights for {count} experts")
    if not all(map(math.isfinite, chosen)):
        raise GateError(f"weights {', '.join(map(str, chosen))}: expected finite numbers")
    return FixedGate(chosen)


def _released(parts: Parts, path: Path, weights: Sequence[float] | None, temperature: float) -> TokenGate:
    if weights is not None:
        raise GateError("experts are weighed by a gate or by weights, not by both")
    gate = read_loraflow_gate(path, temperature=temperature)
    experts, hidden = next(iter(gate.blocks.values())).weight.data.shape
    layers = _layers(parts)
    if len(gate.blocks) != layers:
        raise GateError(f"{path}: gates of {len(gate.blocks)} layers, the base has {layers}")
    if hidden != (expected := parts.base.shape("model.embed_tokens.weight")[1]):
        raise GateError(f"{path}: the gates read hidden_size {hidden}, the base has {expected}")
    if experts != len(parts.experts):
        raise GateError(f"{path}: the gates weigh {experts} experts, {len(parts.experts)} were given")
    return gate


def _layers(parts: Parts) -> int:
    """Decoder blocks of the base, counted in its tensors."""
    blocks = (name.split(".") for name in parts.base.names if name.startswith("model.layers."))
    return 1 + max((int(words[2]) for words in blocks), default=-1)


def _require_modules(parts: Parts) -> None:
    """A PEFT folder does not say of which base it is: its layers and their shapes do."""
    for expert in parts.experts:
        for module, matrix in expert.lora.modules.items():
            name = f"{module}.weight"
            if name not in parts.base:
                raise GateError(f"LoRA {expert.lora.name}: {module} is no layer of {parts.base.folder}")
            if (shape := parts.base.shape(name)) != matrix.shape:
                raise GateError(
                    f"LoRA {expert.lora.name}: {module} has shape {list(matrix.shape)}, in {parts.base.folder} "
                    f"{list(shape)}"
                )
