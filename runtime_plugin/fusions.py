# SPDX-License-Identifier: Apache-2.0
"""From a fusion to what an arena serves: a gate a decoder block, the LoRAs of a layer together. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from deltaweave.formats import (
    BaseRecord,
    Delta,
    DeltaReference,
    FactoredRecord,
    FixedGate,
    Fusion,
    Lora,
    LoraMatrix,
    LoraReference,
)
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.library import MAX_EXPERTS, ParameterKind
from deltaweave.runtime_plugin.records import LoraStack, Mix, ServedRecord
from deltaweave.runtime_plugin.tables import BLOCKS, Table

__all__ = ["expert_records", "fusion_records", "gated_blocks", "require_fusion"]

PROJECTION = "_proj.weight"


def require_fusion(fusion: Fusion, model_type: str) -> None:
    """Refuses what no model of the family, or no runtime, could serve.

    Raises:
        AttachError: another family, experts in files that were not opened, or too many.
    """
    if any(isinstance(expert, (LoraReference, DeltaReference)) for expert in fusion.experts):
        raise AttachError("the fusion names experts in other files: read it with resolve_fusion")
    if fusion.architecture.model_type != model_type:
        raise AttachError(f"the model is a {model_type}, the fusion is of a {fusion.architecture.model_type}")
    if len(fusion.experts) > MAX_EXPERTS:
        raise AttachError(f"fusion of {len(fusion.experts)} experts, a runtime serves 1 to {MAX_EXPERTS}")


def gated_blocks(table: Table) -> list[str]:
    """Decoder blocks of the base, in their order."""
    return [name for name in table.names if table[name].kind == ParameterKind.GATE]


def fusion_records(table: Table, blocks: Sequence[str], fusion: Fusion) -> Iterator[ServedRecord]:
    """Gates and LoRAs of a fusion; experts that are deltas have tenants of their own.

    Raises:
        AttachError: gates for other layers or another hidden size; a LoRA on a layer that the model lacks, that has
            another shape, or that lies in no decoder block.
    """
    if not blocks:
        raise AttachError("the table has no places for gates, so no fusion can be served")
    for block, mix in zip(blocks, _mixes(table, blocks, fusion), strict=True):
        yield ServedRecord(table[block].index, mix)
    for module in dict.fromkeys(name for lora in fusion.loras for name in lora.modules):
        parameter = table[f"{module}.weight"]
        if parameter.kind != ParameterKind.LINEAR or not module.startswith(BLOCKS):
            raise AttachError(f"{module}: a fusion is served on the linear layers of decoder blocks only")
        stack = LoraStack.of((parameter.shape[0], parameter.shape[1]), _matrices(fusion, module, parameter.shape))
        yield ServedRecord(parameter.index, stack)


def expert_records(table: Table, delta: Delta) -> Iterator[ServedRecord]:
    """What of a delta takes part in a fusion: its linear layers in decoder blocks.

    Raises:
        AttachError: a layer of another shape, or one that is not factored.
    """
    for name in delta.names:
        if not (name.startswith(BLOCKS) and name.endswith(PROJECTION)):
            continue
        record, parameter = delta.record(name), table[name]
        if tuple(record.shape) != parameter.shape:
            raise AttachError(f"{name}: the model has shape {list(parameter.shape)}, the delta {list(record.shape)}")
        if isinstance(record, FactoredRecord):
            yield ServedRecord(parameter.index, record)
        elif not isinstance(record, BaseRecord):
            kind = type(record).__name__.removesuffix("Record").lower()
            raise AttachError(f"{delta.path}: {name} is {kind}, an expert of a fusion needs factored records")


def _mixes(table: Table, blocks: Sequence[str], fusion: Fusion) -> Iterator[Mix]:
    gate = fusion.gate
    if isinstance(gate, FixedGate):
        yield from (Mix(None, np.array(gate.weights, np.float32)) for _ in blocks)
        return
    if odd := gate.blocks.keys() ^ set(blocks):
        raise AttachError(
            f"gates of {len(gate.blocks)} blocks, the model has {len(blocks)} layers ({min(odd)} is in one)"
        )
    for block in blocks:
        weight, hidden = gate.blocks[block].weight, table[block].shape[0]
        if weight.data.shape[1] != hidden:
            raise AttachError(f"the gates read hidden_size {weight.data.shape[1]}, the model has {hidden}")
        values = np.ascontiguousarray(weight.to_float32())
        yield Mix(values, gate.blocks[block].bias.to_float32(), gate.temperature)


def _matrices(fusion: Fusion, module: str, shape: tuple[int, ...]) -> list[LoraMatrix | None]:
    """One an expert; None for those that leave the layer alone, or are deltas."""
    found = [expert.modules.get(module) if isinstance(expert, Lora) else None for expert in fusion.experts]
    for matrix in found:
        if matrix is not None and matrix.shape != shape:
            raise AttachError(f"{module}: the model has shape {list(shape)}, the expert {list(matrix.shape)}")
    return found
