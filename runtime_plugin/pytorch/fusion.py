# SPDX-License-Identifier: Apache-2.0
"""A gated fusion of LoRAs and deltas on a Hugging Face model, through the reference ops; kernels are held against it.

For a token x entering linear layer W of a decoder block, and x_block, what that token was on entering the block:

    w = softmax(W_gate x_block / T) + b      [k], one a block and token
    y = W x + sum_i w_i s_i B_i A_i x

The weights act in rank space: `y = W x + B_cat (w_rep s (A_cat x))`, two products whatever k is. An expert that is a
delta adds `w_i U_i^T (sigma_i (V_i x))`. All arithmetic of gate and experts is float32. (LoRA-Flow, arXiv 2402.11455.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deltaweave.formats import (
    BaseRecord,
    DeltaExpert,
    DeltaReference,
    FactoredRecord,
    FixedGate,
    FormatError,
    Fusion,
    Lora,
    LoraMatrix,
    LoraReference,
    TokenGate,
)
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.pytorch.fit import require_base
from deltaweave.runtime_plugin.pytorch.modules import TunedLinear
from deltaweave.runtime_plugin.pytorch.packed import FactoredDelta, exact_tensor
from deltaweave.runtime_plugin.pytorch.reference import delta_linear
from deltaweave.runtime_plugin.pytorch.swaps import Attachment, Swap
from torch import nn

__all__ = ["StackedLora", "attach_fusion", "gate_weights", "gated_lora"]


def gate_weights(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(weight x / temperature) + bias: what a token gives each of k LoRAs.

    Args:
        x: [..., hidden_size], the input of a decoder block, any floating dtype.
        weight: [k, hidden_size].
        bias: [k], added after the softmax: weights may be negative and need not sum to one.
        temperature: above zero.

    Returns:
        [..., k] float32.

    Raises:
        FormatError: x has another number of features.
    """
    if x.shape[-1] != weight.shape[1]:
        raise FormatError(f"input of shape {list(x.shape)}, the gate has hidden_size {weight.shape[1]}")
    return torch.softmax(x.float() @ weight.float().T / temperature, dim=-1) + bias.float()


@dataclass(frozen=True)
class StackedLora:
    """The LoRAs of one linear layer, ranks behind each other.

    Attributes:
        a: [total_rank, in_features].
        b: [out_features, total_rank].
        scales: [total_rank] float32, the LoRA's scale at each of its ranks.
        experts: [total_rank] int64, which LoRA a rank belongs to.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    experts: torch.Tensor

    @classmethod
    def of(cls, matrices: Sequence[tuple[int, LoraMatrix]], device: torch.device) -> StackedLora:
        """From (number of the LoRA, its matrices) of each LoRA that has the layer; at least one, of one shape."""
        ranks = torch.tensor([matrix.rank for _, matrix in matrices])
        scales = torch.tensor([matrix.scale for _, matrix in matrices], dtype=torch.float32)
        experts = torch.tensor([expert for expert, _ in matrices])
        return cls(
            torch.cat([exact_tensor(matrix.a, device).float() for _, matrix in matrices]),
            torch.cat([exact_tensor(matrix.b, device).float() for _, matrix in matrices], dim=1),
            scales.repeat_interleave(ranks).to(device),
            experts.repeat_interleave(ranks).to(device),
        )


def gated_lora(x: torch.Tensor, weights: torch.Tensor, lora: StackedLora) -> torch.Tensor:
    """B_cat (w_rep s (A_cat x)): what a fusion adds to the output of a linear layer.

    Args:
        x: [..., in_features], any floating dtype.
        weights: [..., k] float32 of the same tokens, or broadcast to them.
        lora: of the layer.

    Returns:
        [..., out_features] float32.

    Raises:
        FormatError: x has another number of features.
    """
    if x.shape[-1] != lora.a.shape[1]:
        raise FormatError(f"input of shape {list(x.shape)}, the LoRAs have {lora.a.shape[1]} in_features")
    h = x.float() @ lora.a.T * (weights[..., lora.experts] * lora.scales)
    return h @ lora.b.T


def attach_fusion(model: nn.Module, fusion: Fusion, *, accept_base: bool = False) -> Attachment:
    """Makes a base model compute a fusion, for the whole batch. Put the model on its device first.

    Args:
        model: a Hugging Face causal language model holding the base's weights, which are left as they are.
        fusion: with everything that it names in other files at hand (`resolve_fusion`).
        accept_base: do not compare the model's weights with the fusion's base.

    Returns:
        The attachment, whose `detach` restores the base.

    Raises:
        AttachError: another base or family; a module that the model lacks or has in another shape; a gate for another
            number of layers or hidden size; an expert in another file; a delta whose layers are not all factored.
    """
    if any(isinstance(expert, (LoraReference, DeltaReference)) for expert in fusion.experts):
        raise AttachError("the fusion names experts in other files: read it with resolve_fusion")
    config: Any = model.config
    if config.model_type != fusion.architecture.model_type:
        raise AttachError(f"the model is a {config.model_type}, the fusion is of a {fusion.architecture.model_type}")
    gates = _gates(model, fusion)
    experts = _Experts.of(fusion)
    swaps = [_swap(model, name, experts, gates.of(fusion, name)) for name in experts.modules]
    if not accept_base:
        require_base(model.state_dict().get, fusion.base)
    handles = [block.register_forward_pre_hook(gate, with_kwargs=True) for block, gate in gates.hooks()]
    return Attachment(swaps, handles)


class FusedLinear(nn.Module):
    """A base linear layer and the experts on it, weighed by the gate of its block."""

    def __init__(
        self,
        base: nn.Linear | TunedLinear,
        lora: StackedLora | None,
        deltas: Sequence[tuple[int, FactoredDelta]],
        gate: _Gate,
    ) -> None:
        """`deltas`: (number of the expert, its delta of the layer)."""
        super().__init__()
        self.base, self._lora, self._deltas, self._gate = base, lora, list(deltas), gate
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that asks for its device or dtype."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of x; what the experts add is rounded once."""
        weights, added = self._gate.weights, x.new_zeros(1, dtype=torch.float32)
        if self._lora is not None:
            added = gated_lora(x, weights, self._lora)
        for expert, delta in self._deltas:
            added = added + weights[..., expert, None] * delta_linear(x.float(), delta)
        y: torch.Tensor = self.base(x) + added.to(x.dtype)
        return y


class _Gate:
    """The weights of one block for the tokens that are passing through it; fixed ones never change."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights


class _ReadingGate(_Gate):
    """A gate that reads its block's input, as that block's forward pre-hook."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, temperature: float) -> None:
        super().__init__(bias.float())
        self._weight, self._bias, self._temperature = weight, bias, temperature

    def __call__(self, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["hidden_states"]
        self.weights = gate_weights(x, self._weight, self._bias, self._temperature)


class _Gates:
    """The gate of every block of a model."""

    def __init__(self, fixed: _Gate | None, reading: dict[str, tuple[nn.Module, _ReadingGate]]) -> None:
        self._fixed, self._reading = fixed, reading

    def of(self, fusion: Fusion, module: str) -> _Gate:
        """The gate that weighs the LoRAs on a linear layer."""
        if isinstance(fusion.gate, TokenGate):
            return self._reading[fusion.gate.block_of(module)][1]
        assert self._fixed is not None
        return self._fixed

    def hooks(self) -> list[tuple[nn.Module, _ReadingGate]]:
        """(block, gate) of the gates that read."""
        return list(self._reading.values())


def _gates(model: nn.Module, fusion: Fusion) -> _Gates:
    device = next(model.parameters()).device
    gate = fusion.gate
    if isinstance(gate, FixedGate):
        return _Gates(_Gate(torch.tensor(gate.weights, dtype=torch.float32, device=device)), {})
    _require_layers(model, gate)
    reading = {
        name: (
            _submodule(model, name),
            _ReadingGate(exact_tensor(block.weight, device), exact_tensor(block.bias, device), gate.temperature),
        )
        for name, block in gate.blocks.items()
    }
    return _Gates(None, reading)


def _require_layers(model: nn.Module, gate: TokenGate) -> None:
    """One gate a decoder layer, of the model's width."""
    config: Any = model.config
    expected = {f"model.layers.{index}" for index in range(config.num_hidden_layers)}
    if gate.blocks.keys() != expected:
        odd = min(gate.blocks.keys() ^ expected)
        raise AttachError(f"gates of {len(gate.blocks)} blocks, the model has {len(expected)} layers ({odd} is in one)")
    hidden = next(iter(gate.blocks.values())).weight.data.shape[1]
    if hidden != config.hidden_size:
        raise AttachError(f"the gates read hidden_size {hidden}, the model has {config.hidden_size}")


@dataclass(frozen=True)
class _Experts:
    """What the experts have for each linear layer, in the order of the layers' first mention.

    Attributes:
        loras: by layer, (number of the expert, its matrices).
        records: by layer, (number of the expert, its record).
    """

    loras: dict[str, list[tuple[int, LoraMatrix]]]
    records: dict[str, list[tuple[int, FactoredRecord]]]

    @classmethod
    def of(cls, fusion: Fusion) -> _Experts:
        found = cls({}, {})
        for index, expert in enumerate(fusion.experts):
            if isinstance(expert, Lora):
                for name, matrix in expert.modules.items():
                    found.loras.setdefault(name, []).append((index, matrix))
            elif isinstance(expert, DeltaExpert):
                for name, record in _mixed_records(expert):
                    found.records.setdefault(name, []).append((index, record))
        return found

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys([*self.loras, *self.records]))


def _mixed_records(expert: DeltaExpert) -> Iterator[tuple[str, FactoredRecord]]:
    """(layer, record) of a delta's linear layers in decoder blocks; its other records take no part."""
    for name in expert.delta.names:
        if not (name.startswith("model.layers.") and name.endswith("_proj.weight")):
            continue
        record = expert.delta.record(name)
        if isinstance(record, FactoredRecord):
            yield name.removesuffix(".weight"), record
        elif not isinstance(record, BaseRecord):
            kind = type(record).__name__.removesuffix("Record").lower()
            raise AttachError(f"{expert.delta.path}: {name} is {kind}, an expert of a fusion needs factored records")


def _swap(model: nn.Module, name: str, experts: _Experts, gate: _Gate) -> Swap:
    layer = _submodule(model, name)
    if isinstance(layer, FusedLinear):
        raise AttachError("the model has a fusion attached already; detach it first")
    if not isinstance(layer, (nn.Linear, TunedLinear)):
        raise AttachError(f"{name}: the model has a {type(layer).__name__} there, expected a linear layer")
    shape, device = (layer.out_features, layer.in_features), layer.weight.device
    matrices, records = experts.loras.get(name, []), experts.records.get(name, [])
    for found in [*(matrix.shape for _, matrix in matrices), *(record.shape for _, record in records)]:
        if found != shape:
            raise AttachError(f"{name}: the model has shape {list(shape)}, the expert {list(found)}")
    lora = StackedLora.of(matrices, device) if matrices else None
    deltas = [(index, FactoredDelta.of(record, device)) for index, record in records]
    parent, _, child = name.rpartition(".")
    return Swap(model.get_submodule(parent), child, FusedLinear(layer, lora, deltas, gate))


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise AttachError(f"{name}: the model has no such module") from error
