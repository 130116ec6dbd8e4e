# SPDX-License-Identifier: Apache-2.0
"""What a decoder computes, read from its configuration and the names of its tensors: the families' one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deltaweave.converter.checkpoint import EMBEDDING, HEAD, Checkpoint
from deltaweave.converter.errors import CheckpointError
from deltaweave.converter.export.errors import ExportError
from deltaweave.converter.export.manifest import GraphParameter
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

__all__ = ["FAMILIES", "ROTARY_KINDS", "Decoder"]

# Pre-norm decoders with rotary embeddings, grouped heads and a gated SiLU MLP. What differs among them shows in their
# tensors (biases, q and k norms, tied lm_head) and in two settings (head_dim, sliding windows).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary embeddings whose frequencies do not follow the length of the text.
ROTARY_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Decoder:
    """One decoder.

    Attributes:
        checkpoint: its weights.
        layers: decoder blocks.
        hidden: features of the residual stream.
        intermediate: features of the MLP.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: features of each.
        epsilon: of the norms.
        windows: by layer, how many tokens back attention sees, itself counted; None for all.
        vocabulary: tokens.
        tied: whether lm_head is the embedding.
        inverse_frequencies: of the rotary embedding, [head_dim / 2].
        rotary_scale: what its sines and cosines are multiplied with.
    """

    checkpoint: Checkpoint
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    windows: tuple[int | None, ...]
    vocabulary: int
    tied: bool
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Decoder:
        """Reads a checkpoint's configuration.

        Raises:
            ExportError: another family, or a setting that the graph cannot express.
            CheckpointError: a configuration that Transformers cannot use.
        """
        where = checkpoint.folder / "config.json"
        if checkpoint.model_type not in FAMILIES:
            raise ExportError(f"{where}: model_type {checkpoint.model_type}, expected one of {', '.join(FAMILIES)}")
        try:
            config: Any = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
            kind = config.rope_parameters["rope_type"]
            if kind not in ROTARY_KINDS:
                raise ExportError(f"{where}: rotary embedding {kind}, expected one of {', '.join(ROTARY_KINDS)}")
            rotary = LlamaRotaryEmbedding(config)
        except ExportError:
            raise
        except Exception as error:  # whatever Transformers makes of values that are none
            raise CheckpointError(f"{where}: not usable ({str(error).partition(chr(10))[0]})") from error
        if config.hidden_act != "silu":
            raise ExportError(f"{where}: hidden_act {config.hidden_act}, expected silu")
        if rotary.inv_freq.shape[0] * 2 != _head_dim(config):
            raise ExportError(f"{where}: a rotary embedding of {rotary.inv_freq.shape[0] * 2} of {_head_dim(config)}")
        return cls(
            checkpoint=checkpoint,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            epsilon=config.rms_norm_eps,
            windows=tuple(_window(config, layer) for layer in range(config.num_hidden_layers)),
            vocabulary=config.vocab_size,
            tied=checkpoint.resolve(HEAD) == EMBEDDING,
            inverse_frequencies=tuple(rotary.inv_freq.tolist()),
            rotary_scale=float(rotary.attention_scaling),
        )

    def parameters(self, vocabulary: int, *, gates: bool = False) -> Iterator[GraphParameter]:
        """What fine-tunes may change, in the order of Hugging Face's modules, which every host keeps.

        Args:
            vocabulary: the most tokens that a fine-tune may have.
            gates: with places for the gates of fusions, one a decoder block, behind all else.

        Raises:
            CheckpointError: a tensor that the family has is missing.
        """
        hidden, queries, keys = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield self._parameter(EMBEDDING, "embedding", (self.vocabulary, hidden), vocabulary)
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            for name, shape in (
                ("q_proj", (queries, hidden)),
                ("k_proj", (keys, hidden)),
                ("v_proj", (keys, hidden)),
                ("o_proj", (hidden, queries)),
            ):
                yield from self._linear(f"{block}.self_attn.{name}", shape)
            for name in ("q_norm", "k_norm"):
                if f"{block}.self_attn.{name}.weight" in self.checkpoint:
                    yield self._parameter(f"{block}.self_attn.{name}.weight", "vector", (self.head_dim,))
            for name in ("gate_proj", "up_proj"):
                yield from self._linear(f"{block}.mlp.{name}", (self.intermediate, hidden))
            yield from self._linear(f"{block}.mlp.down_proj", (hidden, self.intermediate))
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield self._parameter(f"{block}.{name}.weight", "vector", (hidden,))
        yield self._parameter("model.norm.weight", "vector", (hidden,))
        yield self._parameter(HEAD, "linear", (self.vocabulary, hidden), vocabulary)
        for layer in range(self.layers if gates else 0):
            yield GraphParameter(name=f"model.layers.{layer}", kind="gate", shape=(hidden,), rows=1)

    def _linear(self, name: str, shape: tuple[int, int]) -> Iterator[GraphParameter]:
        yield self._parameter(f"{name}.weight", "linear", shape)
        if f"{name}.bias" in self.checkpoint:
            yield self._parameter(f"{name}.bias", "vector", shape[:1])

    def _parameter(self, name: str, kind: Any, shape: tuple[int, ...], rows: int = 1) -> GraphParameter:
        stored = self.checkpoint.resolve(name)
        if stored is None:
            raise CheckpointError(f"{self.checkpoint.folder}: has no tensor {name}")
        found = self.checkpoint.shape(stored)
        if found != shape:
            raise CheckpointError(
                f"{self.checkpoint.files[stored]}: {name} has shape {list(found)}, config.json says {list(shape)}"
            )
        return GraphParameter(name=name, kind=kind, shape=shape, rows=max(rows, 1 if kind == "vector" else shape[0]))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer; Llama has none, whatever its configuration says."""
    if config.model_type == "llama":
        return None
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return int(window)
