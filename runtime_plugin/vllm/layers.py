# SPDX-License-Identifier: Apache-2.0
"""What stands in vLLM's model where a tenant may change it. No vLLM here: its layers are known by what they have.

Linear layers, embeddings and lm_head keep their modules and weights and get another `quant_method`, which adds the
tenants' part before ranks are summed or gathered. Norms and the rotary embedding are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deltaweave.runtime_plugin.fit import LENGTH_DEPENDENT, AttachError
from deltaweave.runtime_plugin.tables import BLOCKS, EMBEDDING, HEAD
from deltaweave.runtime_plugin.vllm import ops
from deltaweave.runtime_plugin.vllm.step import Step
from deltaweave.runtime_plugin.vllm.table import RankTable
from torch import nn

__all__ = ["serve"]

# vLLM's fused layers, and the layers of the checkpoint that they are made of.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SINGLE = ("o_proj", "down_proj")
NORM = "input_layernorm"


class ServedLinear:
    """The `quant_method` of a linear layer of 16 bits: its product, and what tenants add to that on this rank."""

    def __init__(self, base: Any, step: Step, table: RankTable, names: Sequence[str]) -> None:
        """Finds the layer's rows of the directory.

        Args:
            base: the layer's own method.
            step: of the process.
            table: of the rank.
            names: of the checkpoint's layers, in the order of their outputs.
        """
        weights = [f"{name}.weight" for name in names]
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in table]
        self.base = base
        self.widths = [table.rows(name) for name in weights]
        self.in_offset = table.in_offset(weights[0])
        self.out_offsets = [table.out_offset(name) for name in weights]
        indices = [table[name].index for name in (*weights, *biases)]
        first, last = min(indices), max(indices)
        self.directory = step.arena.directory[first : last + 1]
        self.weights = [table[name].index - first for name in weights]
        self.biases = [table[name].index - first for name in biases]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[tokens, in_features] to [tokens, all outputs]."""
        weight: Any = layer.weight
        if x.is_cuda:
            y = x.new_empty(x.shape[0], weight.shape[0])
        else:  # vLLM's CPU build packs weights in its own way
            y, weight = self.base.apply(layer, x, None), None
        own = (self.directory, self.widths, self.weights, self.biases, self.in_offset, self.out_offsets)
        ops.linear(x, y, weight, bias, *own)
        return y

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # of an object that is not made yet
            raise AttributeError(name)
        return getattr(self.base, name)


class ServedVocabulary:
    """The `quant_method` of an embedding, of lm_head, or of one that is both."""

    def __init__(self, base: Any, step: Step, table: RankTable) -> None:
        """`base`: the layer's own method."""
        self.base, self.step = base, step
        self.embeddings = _rows(step, table, EMBEDDING)
        self.head = _rows(step, table, HEAD)
        cut = table.cut(HEAD)
        self.start = 0 if cut is None else cut.start
        self.rows, self.out_offset = table.rows(HEAD), table.out_offset(HEAD)

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """[tokens] ids of this rank's rows to [tokens, hidden_size]."""
        weight: Any = layer.weight
        rows: torch.Tensor = ops.embed(ids, weight, self.embeddings)
        return rows

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, hidden_size] to logits of this rank's tokens; minus infinity for those that a tenant does not know."""
        y: torch.Tensor = self.base.apply(layer, x, bias)
        if not self.step.own_logits:
            return y
        slots = self.step.logit_slots(x)
        known = y[:, : self.rows]  # behind it lies the padding
        self.step.add_to_logits(x, known, slots, self.head, self.out_offset)
        limits = self.step.arena.settings.vocabulary[slots] - self.start
        missing = torch.arange(self.rows, device=y.device) >= limits[:, None]
        known.masked_fill_(missing, -torch.inf)
        return y

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # of an object that is not made yet
            raise AttributeError(name)
        return getattr(self.base, name)


class ServedNorm(nn.Module):
    """An RMSNorm with the weight of each token's tenant; in front of a block it also weighs a fusion's experts.

    In plain torch: torch.compile makes one kernel of it and its neighbours, as of vLLM's own.
    """

    def __init__(self, base: Any, step: Step, weights: torch.Tensor, gate: torch.Tensor | None) -> None:
        """`base`: vLLM's norm; `weights`: of all slots, the base's in the last row."""
        super().__init__()
        self.weight, self.variance_epsilon = base.weight, float(base.variance_epsilon)
        self.weights, self.rows, self.gate = weights, step.settings_rows, gate

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[tokens, ..., features] to the same; with a residual, that is added first and the sum returned too."""
        if residual is not None:
            x = x + residual
        weight = self.weights[self.rows[: x.shape[0]]].unflatten(0, (-1, *[1] * (x.dim() - 2)))
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        y = normal.to(x.dtype) * weight
        if self.gate is not None:
            ops.weigh(x, y, self.gate)
        return y if residual is None else (y, x)


class ServedRotary(nn.Module):
    """Rotary embeddings with the frequencies of each token's tenant."""

    def __init__(self, base: Any, step: Step) -> None:
        """`base`: vLLM's, whose heads these are."""
        super().__init__()
        self.head_size, self.rows, settings = int(base.head_size), step.settings_rows, step.arena.settings
        self.frequencies, self.scale = settings.inverse_frequencies, settings.rotary_scale

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions [tokens], queries and keys [tokens, heads * head_size]."""
        rows = self.rows[: positions.shape[0]]
        angles = positions.float()[:, None] * self.frequencies[rows]
        scale = self.scale[rows][:, None]
        cos, sin = (angles.cos() * scale).to(query.dtype)[:, None], (angles.sin() * scale).to(query.dtype)[:, None]
        return self._rotated(query, cos, sin), None if key is None else self._rotated(key, cos, sin)

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = cos.shape[-1]
        heads = x.view(x.shape[0], -1, self.head_size)
        first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        parts = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(parts, dim=-1).reshape(x.shape)


def serve(model: Any, step: Step, table: RankTable) -> None:
    """Makes vLLM's model compute the arena's tenants.

    Args:
        model: its Llama, Mistral, Qwen2 or Qwen3, loaded, one rank's.
        step: of the process.
        table: of the rank.

    Raises:
        AttachError: a layer that the base's configuration does not have, or lacks.
    """
    served: set[str] = set()
    vocabulary: dict[int, ServedVocabulary] = {}
    for layer in (model.model.embed_tokens, model.lm_head):
        if id(layer) not in vocabulary:
            vocabulary[id(layer)] = layer.quant_method = ServedVocabulary(layer.quant_method, step, table)
    weights = _norm_weights(model, step, table)
    rotary: dict[int, ServedRotary] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):  # one rotary embedding serves all blocks
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        names = [f"{parent}.{part}" for part in FUSED.get(child, (child,) if child in SINGLE else ())]
        if names:
            module.quant_method = ServedLinear(module.quant_method, step, table, names)
            served.update(names)
        elif type(module).__name__.endswith("RMSNorm"):
            setattr(owner, child, ServedNorm(module, step, weights[name], _gate(step, table, name)))
            served.add(name)
        elif child == "rotary_emb" and table.model.model.rotary_emb.rope_type not in LENGTH_DEPENDENT:
            if not getattr(module, "is_neox_style", True):
                raise AttachError(f"{name}: a rotary embedding of interleaved pairs is not served")
            if id(module) not in rotary:
                rotary[id(module)] = ServedRotary(module, step)
            setattr(owner, child, rotary[id(module)])
    wanted = {name.removesuffix(".weight") for name in table.names if name.endswith(".weight")}
    if missing := wanted - served - {EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")}:
        raise AttachError(f"{min(missing)}: vLLM's {type(model).__name__} has no such layer, so it cannot be served")


def _norm_weights(model: Any, step: Step, table: RankTable) -> dict[str, torch.Tensor]:
    """Of all norms, [slots + 1, features] by their names: the arena's settings keep them beside its bytes."""
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    indices = {name: table[f"{name}.weight"].index for name in norms}
    kept = step.arena.settings.keep({indices[name]: norm.weight.detach() for name, norm in norms.items()})
    return {name: kept[index] for name, index in indices.items()}


def _gate(step: Step, table: RankTable, norm: str) -> torch.Tensor | None:
    """The directory's row of the gate of the block that a norm stands in front of, if it does and fusions are on."""
    block, _, child = norm.rpartition(".")
    return _rows(step, table, block) if child == NORM and step.fusions and block.startswith(BLOCKS) else None


def _rows(step: Step, table: RankTable, name: str) -> torch.Tensor:
    """The directory's row of one parameter, [1, slots, fields]."""
    index = table[name].index
    return step.arena.directory[index : index + 1]
