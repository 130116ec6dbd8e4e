# SPDX-License-Identifier: Apache-2.0
"""What a fusion holds: experts of one base (LoRAs, or whole fine-tunes as deltas) and the gate that weighs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from deltaweave.formats.delta import Delta
from deltaweave.formats.errors import FormatError
from deltaweave.formats.header import Architecture
from deltaweave.formats.identity import BaseIdentity
from deltaweave.formats.layout import is_file_name, is_parameter_name
from deltaweave.formats.records import ExactArray

__all__ = [
    "MAX_EXPERTS",
    "BlockGate",
    "DeltaExpert",
    "DeltaReference",
    "Expert",
    "FixedGate",
    "Fusion",
    "Lora",
    "LoraMatrix",
    "LoraReference",
    "TokenGate",
]

MAX_EXPERTS = 64


@dataclass(frozen=True)
class LoraMatrix:
    """What a LoRA adds to one linear layer: y += scale * B (A x).

    Attributes:
        a: [rank, in_features], the values of the adapter's file.
        b: [out_features, rank], in the dtype of `a`.
        scale: alpha / rank, or whatever the adapter's rule made of them.
    """

    a: ExactArray
    b: ExactArray
    scale: float

    def __post_init__(self) -> None:
        a, b = self.a.data, self.b.data
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise FormatError(f"A of shape {list(a.shape)} and B of shape {list(b.shape)} share no rank of at least 1")
        if self.a.dtype != self.b.dtype:
            raise FormatError(f"A of {self.a.dtype} and B of {self.b.dtype}, expected one dtype")
        if not math.isfinite(self.scale):
            raise FormatError(f"scale {self.scale}, expected a finite number")

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return int(self.a.data.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""
        return int(self.b.data.shape[0]), int(self.a.data.shape[1])


@dataclass(frozen=True)
class Lora:
    """A LoRA whose matrices lie in the fusion's own file.

    Attributes:
        name: what it calls itself.
        license: as its model card states it, if it does.
        modules: by name of the linear layer (`model.layers.0.self_attn.q_proj`); others are absent.
    """

    name: str
    license: str | None
    modules: Mapping[str, LoraMatrix]

    def __post_init__(self) -> None:
        if not self.modules:
            raise FormatError(f"LoRA {self.name}: has no modules")
        _require_names(self.modules)


@dataclass(frozen=True)
class LoraReference:
    """A LoRA that lies in a fusion file of its own, beside the one that names it.

    Attributes:
        name: what it calls itself.
        path: plain file name.
        header_sha256: of that file's header string, which holds the digests of all of its tensors.
    """

    name: str
    path: str
    header_sha256: str

    def __post_init__(self) -> None:
        _require_file_name(self.path)


@dataclass(frozen=True)
class DeltaReference:
    """A compressed fine-tune as an expert: a delta file, or a sharded one's index, beside the fusion.

    Its linear layers in decoder blocks are weighed; its norms, biases, embeddings and lm_head are not used.

    Attributes:
        name: what it calls itself.
        path: plain file name.
        header_sha256: of the delta's header string.
    """

    name: str
    path: str
    header_sha256: str

    def __post_init__(self) -> None:
        _require_file_name(self.path)


@dataclass(frozen=True)
class DeltaExpert:
    """A delta that a `DeltaReference` named, opened.

    Attributes:
        name: what it calls itself.
        delta: the file.
    """

    name: str
    delta: Delta


Expert = Lora | LoraReference | DeltaReference | DeltaExpert


@dataclass(frozen=True)
class FixedGate:
    """The same weight of every expert for every layer and token.

    Attributes:
        weights: one an expert.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.weights)):
            raise FormatError(f"weights {list(self.weights)}, expected finite numbers")


@dataclass(frozen=True)
class BlockGate:
    """The gate of one decoder block: w = softmax(weight x / temperature) + bias.

    Attributes:
        weight: [experts, hidden_size].
        bias: [experts], in the dtype of `weight`.
    """

    weight: ExactArray
    bias: ExactArray

    def __post_init__(self) -> None:
        if self.weight.data.ndim != 2 or self.bias.data.shape != self.weight.data.shape[:1]:
            shapes = f"{list(self.weight.data.shape)} and bias of shape {list(self.bias.data.shape)}"
            raise FormatError(f"gate of shape {shapes}, expected [experts, hidden_size] and [experts]")
        if self.weight.dtype != self.bias.dtype:
            raise FormatError(f"gate of {self.weight.dtype} and bias of {self.bias.dtype}, expected one dtype")
        if not all(np.isfinite(array.to_float32()).all() for array in (self.weight, self.bias)):
            raise FormatError("gate has values that are not finite")


@dataclass(frozen=True)
class TokenGate:
    """LoRA-Flow's gate: weights a layer and token, read from the input of the decoder block, before its norm.

    Attributes:
        blocks: by name of the decoder block (`model.layers.0`), whose linear layers all get the same weights.
        temperature: divides the logits.
    """

    blocks: Mapping[str, BlockGate]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise FormatError(f"temperature {self.temperature}, expected a finite number above 0")
        if len({block.weight.data.shape for block in self.blocks.values()}) != 1:
            raise FormatError("gates of the blocks differ in shape, or there are none")
        _require_names(self.blocks)
        for name in self.blocks:
            if outer := self._outer(name):
                raise FormatError(f"gate of block {name} lies within block {outer}, which has one too")

    def block_of(self, module: str) -> str:
        """The block whose gate weighs a linear layer.

        Raises:
            FormatError: the layer lies in no block that has a gate.
        """
        if (block := self._outer(module)) is None:
            raise FormatError(f"module {module} lies in no block that has a gate")
        return block

    def _outer(self, name: str) -> str | None:
        """The gated block that a name lies in, itself not counted."""
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self.blocks:
                return name
        return None


@dataclass(frozen=True)
class Fusion:
    """Experts of one base and their gate; one LoRA with the fixed weight 1 is that LoRA alone.

    Attributes:
        tool: name and version of what made it.
        base: the checkpoint that the experts belong to.
        architecture: of that checkpoint.
        method: JSON object; `name` is required (`lora-flow`, `average`, `lora`), the rest is the recipe.
        experts: in the gate's order.
        gate: what weighs them.
        training: JSON object describing the gate's training data, or None.
    """

    tool: str
    base: BaseIdentity
    architecture: Architecture
    method: Mapping[str, Any]
    experts: tuple[Expert, ...]
    gate: FixedGate | TokenGate
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        count = len(self.experts)
        if not 1 <= count <= MAX_EXPERTS:
            raise FormatError(f"fusion of {count} experts, expected 1 to {MAX_EXPERTS}")
        weighed = _weighed(self.gate)
        if weighed != count:
            raise FormatError(f"gate weighs {weighed} experts, the fusion has {count}")
        _require_shapes(self.loras)
        if isinstance(self.gate, TokenGate):
            for lora in self.loras:
                for module in lora.modules:
                    self.gate.block_of(module)

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that are inlined."""
        return tuple(expert for expert in self.experts if isinstance(expert, Lora))


def _weighed(gate: FixedGate | TokenGate) -> int:
    if isinstance(gate, FixedGate):
        return len(gate.weights)
    return int(next(iter(gate.blocks.values())).bias.data.shape[0])


def _require_shapes(loras: tuple[Lora, ...]) -> None:
    """LoRAs of one base agree on the shape of every layer that they share."""
    shapes: dict[str, tuple[int, int]] = {}
    for lora in loras:
        for name, matrix in lora.modules.items():
            if shapes.setdefault(name, matrix.shape) != matrix.shape:
                raise FormatError(
                    f"LoRA {lora.name}: {name} has shape {list(matrix.shape)}, another LoRA says {list(shapes[name])}"
                )


def _require_file_name(path: str) -> None:
    if not is_file_name(path):
        raise FormatError(f"path {path[:200]!r}, expected a plain name of letters, digits, '.', '_' and '-'")


def _require_names(names: Mapping[str, object]) -> None:
    for name in names:
        if not is_parameter_name(name):
            raise FormatError(f"module {name[:200]!r}: not an allowed name")
