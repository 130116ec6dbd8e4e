# SPDX-License-Identifier: Apache-2.0
"""Model families: where a decoder block keeps its projections, and in which order calibration must visit them."""

from __future__ import annotations

from dataclasses import dataclass

from deltaweave.converter.checkpoint import Checkpoint
from deltaweave.converter.errors import CheckpointError

__all__ = ["FAMILIES", "Family", "Half", "Projection", "family_of"]


@dataclass(frozen=True)
class Half:
    """A half of a decoder block: it makes `stream + inner(norm(stream))` of the residual stream.

    Attributes:
        norm: its norm's name inside the block.
        inner: attention's or the MLP's name.
    """

    norm: str
    inner: str


@dataclass(frozen=True)
class Projection:
    """One linear layer of a decoder block.

    Attributes:
        weight: its parameter's name, such as `model.layers.0.self_attn.q_proj.weight`.
        module: its name inside the block, such as `self_attn.q_proj`.
        layer: the block's index.
        shape: (out_features, in_features).
        half: of the block.
        closes_half: whether its output is what its half adds to the residual stream.
    """

    weight: str
    module: str
    layer: int
    shape: tuple[int, int]
    half: Half
    closes_half: bool

    @property
    def kind(self) -> str:
        """The short name shared by all blocks, such as `q_proj`."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class Family:
    """A decoder architecture.

    Attributes:
        model_type: the name in `config.json`.
        stages: projections of a block in data order; those of one stage share their input, and each stage is
            calibrated behind the already compressed ones before it (GPTQ's true-sequential order).
        halves: of a block, in data order; the last stage of each is one projection, which closes it.
    """

    model_type: str
    stages: tuple[tuple[str, ...], ...]
    halves: tuple[Half, Half]
    blocks: str = "model.layers"

    def projections(self, checkpoint: Checkpoint) -> list[list[list[Projection]]]:
        """All projections of a checkpoint, as [layer][stage][position].

        Raises:
            CheckpointError: naming the first projections that were not found.
        """
        layers = int(checkpoint.config["num_hidden_layers"])
        missing = self.missing(checkpoint, layers)
        if missing:
            raise CheckpointError(f"{checkpoint.folder}: {_not_found(missing)}")
        return [
            [[self._projection(checkpoint, layer, module) for module in stage] for stage in self.stages]
            for layer in range(layers)
        ]

    def missing(self, checkpoint: Checkpoint, layers: int) -> list[str]:
        """Projection weights that the checkpoint lacks."""
        wanted = (self._weight(layer, module) for layer in range(layers) for stage in self.stages for module in stage)
        return [name for name in wanted if name not in checkpoint]

    def _weight(self, layer: int, module: str) -> str:
        return f"{self.blocks}.{layer}.{module}.weight"

    def _projection(self, checkpoint: Checkpoint, layer: int, module: str) -> Projection:
        weight = self._weight(layer, module)
        shape = checkpoint.shape(weight)
        if len(shape) != 2:
            raise CheckpointError(
                f"{checkpoint.folder}: {weight} has shape {shape}, expected [out_features, in_features]"
            )
        half = next(half for half in self.halves if module.startswith(half.inner + "."))
        last = [stage for stage in self.stages if stage[0].startswith(half.inner + ".")][-1]
        return Projection(weight, module, layer, (shape[0], shape[1]), half, module in last)


_LLAMA_STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_LLAMA_HALVES = (Half("input_layernorm", "self_attn"), Half("post_attention_layernorm", "mlp"))
FAMILIES = {name: Family(name, _LLAMA_STAGES, _LLAMA_HALVES) for name in ("llama", "mistral", "qwen2", "qwen3")}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: an architecture that is not supported; the message names the projections looked for in vain.
    """
    family = FAMILIES.get(checkpoint.model_type)
    if family is None:
        missing = FAMILIES["llama"].missing(checkpoint, layers=1)
        found = _not_found(missing) if missing else "its projections have known names, but the family is untested"
        raise CheckpointError(
            f"{checkpoint.folder}: architecture {checkpoint.model_type!r} is not supported "
            f"(supported: {', '.join(sorted(FAMILIES))}); {found}"
        )
    if "num_hidden_layers" not in checkpoint.config:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: has no num_hidden_layers")
    return family


def _not_found(missing: list[str]) -> str:
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return f"projections not found: {', '.join(missing[:4])}{more}"
