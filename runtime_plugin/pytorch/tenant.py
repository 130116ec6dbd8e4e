# SPDX-License-Identifier: Apache-2.0
"""Tenants of a Hugging Face model: the table of its parameters, and what a delta changes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deltaweave.formats import BaseIdentity, Delta, DeltaExpert, Fusion
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.fit import (
    LENGTH_DEPENDENT,
    AttachError,
    generation_settings,
    is_vocabulary,
    require_vocabulary,
    tuned_config,
)
from deltaweave.runtime_plugin.fusions import expert_records, fusion_records, gated_blocks, require_fusion
from deltaweave.runtime_plugin.library import ParameterKind
from deltaweave.runtime_plugin.pytorch.fit import require_base, rotary_embedding
from deltaweave.runtime_plugin.records import ServedRecord
from deltaweave.runtime_plugin.tables import BLOCKS, EMBEDDING, HEAD, BaseParameter, Table, served_records
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig

__all__ = ["ParameterTable", "Tenant", "load_fusion", "load_tenant"]

ROTARY = "model.rotary_emb"
# Tokens that a tenant may add to the base's vocabulary where nobody says how many.
SPARE_TOKENS = 256


class ParameterTable(Table):
    """The table of a model in memory."""

    def __init__(self, model: nn.Module, vocabulary: int | None = None, *, gates: bool = False) -> None:
        """Lists the linear layers, their biases, the norms and the embeddings of a Hugging Face decoder.

        Args:
            model: holding the base, nothing attached.
            vocabulary: the most tokens that a tenant may have; None for the base's and SPARE_TOKENS more.
            gates: with places for the gates of fusions, one a decoder block, behind all else.

        Raises:
            AttachError: not such a model.
        """
        known = {name: len(parameter) for name, parameter in model.named_parameters()}.get(EMBEDDING, 0)
        super().__init__({}, known + SPARE_TOKENS if vocabulary is None else vocabulary)
        self.model: Any = model
        self.rotary: Any = dict(model.named_modules()).get(ROTARY)  # an attachment stands in its place
        self._checked: set[str] = set()
        for name, module in model.named_modules():
            self._list(name, module)
        for name, found in ((EMBEDDING, EMBEDDING in self), (HEAD, HEAD in self), (ROTARY, self.rotary is not None)):
            if not found:
                raise AttachError(f"the model has no {name}: expected a Hugging Face decoder with nothing attached")
        if gates:
            self._list_gates()

    def require_base(self, base: BaseIdentity) -> None:
        """Checks the model's values against a delta's base, once for all deltas of the same base."""
        if base.root not in self._checked:
            require_base(self.model.state_dict().get, base)
            self._checked.add(base.root)

    def same(self, alias: str, owner: str) -> bool:
        """Whether the model has one tensor under both names."""
        return self.model.get_parameter(alias) is self.model.get_parameter(owner)

    def read(self, name: str) -> NDArray[np.float32]:
        """A parameter's values."""
        values: NDArray[np.float32] = self.model.get_parameter(name).detach().float().cpu().numpy()
        return values

    def local(self, records: Iterable[ServedRecord]) -> Iterable[ServedRecord]:
        """What this process serves of a tenant's records: all of them, unless ranks share the model."""
        return records

    def _list(self, name: str, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind = ParameterKind.LINEAR if isinstance(module, nn.Linear) else ParameterKind.EMBEDDING
            self._add(f"{name}.weight", kind, module.weight)
            if getattr(module, "bias", None) is not None:
                self._add(f"{name}.bias", ParameterKind.VECTOR, module.bias)
        elif type(module).__name__.endswith("RMSNorm"):
            self._add(f"{name}.weight", ParameterKind.VECTOR, module.weight)

    def _list_gates(self) -> None:
        config = self.model.config
        for layer in range(config.num_hidden_layers):
            place = BaseParameter(len(self), ParameterKind.GATE, (int(config.hidden_size),), 1)
            self._entries[f"{BLOCKS}{layer}"] = place

    def _add(self, name: str, kind: ParameterKind, weight: Any) -> None:
        shape = tuple(weight.shape)
        rows = (
            1 if kind == ParameterKind.VECTOR else max(shape[0], self.vocabulary) if is_vocabulary(name) else shape[0]
        )
        self._entries[name] = BaseParameter(len(self._entries), kind, shape, rows)


@dataclass(frozen=True)
class Tenant:
    """A fine-tune or a fusion that an arena can serve.

    Attributes:
        name: what requests call it.
        path: of its file.
        records: what it changes.
        vocabulary: its number of tokens.
        inverse_frequencies: of its rotary embedding, float32 [head_dim / 2].
        rotary_scale: what that embedding's sines and cosines are multiplied with.
        generation: its own generation settings, if it brings some.
        experts: of a fusion, tenants of their own by the expert's place: those that are deltas.
        is_fusion: whether it has a gate.
    """

    name: str
    path: Path
    records: tuple[ServedRecord, ...]
    vocabulary: int
    inverse_frequencies: torch.Tensor
    rotary_scale: float
    generation: GenerationConfig | None = None
    experts: Mapping[int, Tenant] = field(default_factory=dict)
    is_fusion: bool = False

    @cached_property
    def shapes(self) -> list[library.Record]:
        """Of its records, as the library wants them."""
        return [record.shape() for record in self.records]


def load_tenant(table: ParameterTable, delta: Delta, name: str, *, accept_base: bool = False) -> Tenant:
    """Reads a delta as a tenant; large parts stay views of the file.

    Raises:
        AttachError: another base or family, or something that an arena does not serve.
    """
    model: Any = table.model
    tuned = tuned_config(model.config, delta)
    require_vocabulary(delta, tuned)
    if tuned.vocab_size > table.vocabulary:
        raise AttachError(
            f"{delta.path}: a vocabulary of {tuned.vocab_size}, the arena takes up to {table.vocabulary}; make it with "
            "a larger vocabulary"
        )
    if not accept_base:
        table.require_base(delta.header.base)
    rotary = table.rotary
    if tuned.rope_parameters != model.config.rope_parameters:
        kinds = {settings.rope_parameters["rope_type"] for settings in (tuned, model.config)}
        if kinds & LENGTH_DEPENDENT:
            raise AttachError(f"{delta.path}: rotary embedding {max(kinds)} cannot be served beside others")
        rotary = rotary_embedding(rotary, tuned)
    return Tenant(
        name=name,
        path=delta.path,
        records=tuple(table.local(served_records(table, delta, table))),
        vocabulary=int(tuned.vocab_size),
        inverse_frequencies=rotary.inv_freq.float().cpu(),
        rotary_scale=float(rotary.attention_scaling),
        generation=generation_settings(delta),
    )


def load_fusion(table: ParameterTable, fusion: Fusion, name: str, path: Path, *, accept_base: bool = False) -> Tenant:
    """Reads a fusion as a tenant, its experts that are deltas as tenants of their own.

    Args:
        table: of the model.
        fusion: with what it names in other files at hand (`resolve_fusion`).
        name: what requests call it.
        path: of its file, for errors.
        accept_base: do not compare the model's weights with the fusion's base.

    Raises:
        AttachError: another base or family, a gate for another model, or something that an arena does not serve.
    """
    require_fusion(fusion, table.model.config.model_type)
    blocks = gated_blocks(table)
    if not accept_base:
        table.require_base(fusion.base)

    def tenant(own: str, records: Iterable[ServedRecord], **more: Any) -> Tenant:
        return Tenant(
            name=own,
            path=path,
            records=tuple(table.local(records)),
            vocabulary=table[EMBEDDING].shape[0],
            inverse_frequencies=table.rotary.inv_freq.float().cpu(),
            rotary_scale=float(table.rotary.attention_scaling),
            **more,
        )

    experts = {
        index: tenant(f"{name}/{expert.name}", expert_records(table, expert.delta))
        for index, expert in enumerate(fusion.experts)
        if isinstance(expert, DeltaExpert)
    }
    return tenant(name, fusion_records(table, blocks, fusion), experts=experts, is_fusion=True)
