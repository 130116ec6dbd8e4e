# SPDX-License-Identifier: Apache-2.0
"""The differentiable forward of a fusion, in whatever dtype the model has; held against the runtime's reference op.

w = softmax(W_gate x_block / T) + b      [k], one a block and token; float32 at least
y = W x + B_cat ((w S) (A_cat x))        S [k, total_rank]: scale of expert e at each of its ranks, else 0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from deltaweave.formats.fusion import BlockGate, FixedGate, Lora, LoraMatrix, TokenGate
from deltaweave.formats.records import ExactArray
from deltaweave.gates.experts import GateError
from deltaweave.runtime_plugin.pytorch.packed import exact_tensor
from deltaweave.runtime_plugin.pytorch.swaps import Attachment, Swap

__all__ = ["FixedWeights", "Mixture", "TokenWeights", "Weigher", "attach_mixture", "weigher_of"]


class FixedWeights(nn.Module):
    """The same weights for every block and token; `weights` [experts] may be assigned."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights: torch.Tensor
        self.register_buffer("weights", torch.tensor(list(weights), dtype=torch.float32))

    def forward(self, block: int, x: torch.Tensor) -> torch.Tensor:
        """[experts], whatever the token."""
        return self.weights


class TokenWeights(nn.Module):
    """LoRA-Flow's gates.

    Attributes:
        weight: [blocks, experts, hidden_size].
        bias: [blocks, experts], added after the softmax.
        temperature: divides the logits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.temperature = temperature

    @classmethod
    def starting(cls, blocks: int, experts: int, hidden_size: int, task: int, temperature: float = 1.0) -> TokenWeights:
        """Gates as training starts them: W_gate = 0 and biases such that w is 1 for expert `task`, 0 for others."""
        bias = torch.full((blocks, experts), -1.0 / experts)
        bias[:, task] += 1.0
        return cls(torch.zeros(blocks, experts, hidden_size), bias, temperature)

    @classmethod
    def of(cls, gate: TokenGate) -> TokenWeights:
        """Gates as a fusion has them, in float32; blocks in the order of their numbers."""
        names = sorted(gate.blocks, key=_block_number)
        weight = torch.stack([exact_tensor(gate.blocks[name].weight).float() for name in names])
        bias = torch.stack([exact_tensor(gate.blocks[name].bias).float() for name in names])
        return cls(weight, bias, gate.temperature)

    def gate(self) -> TokenGate:
        """Gates as a fusion stores them, float32."""
        weight, bias = (value.detach().float().cpu().numpy() for value in (self.weight, self.bias))
        blocks = {
            f"model.layers.{index}": BlockGate(ExactArray(weight[index], "F32"), ExactArray(bias[index], "F32"))
            for index in range(len(weight))
        }
        return TokenGate(blocks, self.temperature)

    def forward(self, block: int, x: torch.Tensor) -> torch.Tensor:
        """softmax(weight x / temperature) + bias, in the gates' own dtype."""
        logits = functional.linear(x.to(self.weight.dtype), self.weight[block]) / self.temperature
        return torch.softmax(logits, dim=-1) + self.bias[block]


# What gives the tokens x [..., hidden_size] that enter block number `block` their weights of the experts.
Weigher = FixedWeights | TokenWeights


def weigher_of(gate: FixedGate | TokenGate) -> Weigher:
    """A stored gate as what computes it."""
    return FixedWeights(gate.weights) if isinstance(gate, FixedGate) else TokenWeights.of(gate)


class Mixture(Attachment):
    """A model that computes experts mixed by a weigher; `detach` restores the base."""

    def __init__(self, swaps: Sequence[Swap], slots: Sequence[_Slot], handles: Sequence[RemovableHandle]) -> None:
        """Carries out the swaps; use `attach_mixture`."""
        super().__init__(swaps)
        self._slots, self._handles = slots, list(handles)

    def weights(self) -> torch.Tensor:
        """[blocks, batch, tokens, experts] float32: what the last forward's tokens gave the experts.

        Fixed weights have extents of 1 for batch and tokens.
        """
        found = [slot.weights.detach().float() for slot in self._slots]
        return torch.stack([weights if weights.ndim == 3 else weights[None, None] for weights in found])

    def detach(self) -> None:
        """Restores the base; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        super().detach()


def attach_mixture(model: nn.Module, loras: Sequence[Lora], weigher: Weigher) -> Mixture:
    """Makes a base model compute experts, for the whole batch. Put the model on its device, in its dtype, first.

    Args:
        model: a Hugging Face causal language model; its parameters stop asking for gradients.
        loras: the experts, kept in the model's dtype.
        weigher: put on the model's device; gradients flow to its parameters.

    Raises:
        GateError: an expert of a module that the model lacks, or has in another shape, or outside its decoder blocks.
    """
    model.requires_grad_(False)
    weigher.to(next(model.parameters()).device)
    blocks: Any = model.get_submodule("model.layers")
    slots = [_Slot(index, weigher) for index in range(len(blocks))]
    names = list(dict.fromkeys(name for lora in loras for name in lora.modules))
    swaps = [_swap(model, name, loras, slots) for name in names]
    handles = [
        block.register_forward_pre_hook(slot, with_kwargs=True) for block, slot in zip(blocks, slots, strict=True)
    ]
    return Mixture(swaps, slots, handles)


class MixedLinear(nn.Module):
    """A base linear layer and the experts on it.

    Attributes:
        a: [total_rank, in_features], experts behind each other.
        b: [out_features, total_rank].
        spread: [experts, total_rank], the scale of an expert at each of its ranks, 0 at others'.
    """

    def __init__(self, base: nn.Linear, matrices: Sequence[LoraMatrix | None], slot: _Slot) -> None:
        super().__init__()
        self.base, self._slot = base, slot
        self.in_features, self.out_features = base.in_features, base.out_features
        held = [matrix for matrix in matrices if matrix is not None]
        self.a = torch.cat([exact_tensor(matrix.a).to(base.weight) for matrix in held])
        self.b = torch.cat([exact_tensor(matrix.b).to(base.weight) for matrix in held], dim=1)
        spreads = [torch.full((1, matrix.rank), matrix.scale) if matrix else torch.zeros(1, 0) for matrix in matrices]
        self.spread = torch.block_diag(*spreads).to(base.weight.device)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that asks for its device or dtype."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of x."""
        weights = self._slot.weights
        h = functional.linear(x, self.a)
        h = h * (weights @ self.spread.to(weights.dtype)).to(h.dtype)
        y: torch.Tensor = self.base(x) + functional.linear(h, self.b)
        return y


class _Slot:
    """The weights of the tokens that are passing through one block; as that block's pre-hook it computes them."""

    weights: torch.Tensor

    def __init__(self, block: int, weigher: Weigher) -> None:
        self._block, self._weigher = block, weigher

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["hidden_states"]
        self.weights = self._weigher(self._block, x)


def _swap(model: nn.Module, name: str, loras: Sequence[Lora], slots: Sequence[_Slot]) -> Swap:
    parent, _, child = name.rpartition(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise GateError(f"{name}: the model has no such module") from error
    if isinstance(layer, MixedLinear):
        raise GateError("the model has experts attached already; detach them first")
    if not isinstance(layer, nn.Linear):
        raise GateError(f"{name}: the model has a {type(layer).__name__} there, expected a linear layer")
    for lora in loras:
        shape = lora.modules[name].shape if name in lora.modules else (layer.out_features, layer.in_features)
        if shape != (layer.out_features, layer.in_features):
            expected = [layer.out_features, layer.in_features]
            raise GateError(f"{lora.name}: {name} has shape {list(shape)}, the model {expected}")
    mixed = MixedLinear(layer, [lora.modules.get(name) for lora in loras], slots[_block_number(name)])
    return Swap(model.get_submodule(parent), child, mixed)


def _block_number(name: str) -> int:
    """N of `model.layers.N` or of a module below it.

    Raises:
        GateError: a name of no decoder block.
    """
    if not (match := re.match(r"model\.layers\.(\d{1,6})(\.|$)", name)):
        raise GateError(f"{name}: lies in no decoder block")
    return int(match[1])
