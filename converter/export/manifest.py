# SPDX-License-Identifier: Apache-2.0
"""What an exported graph says of itself, for whoever builds and runs it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Dtype", "GraphManifest", "GraphParameter", "GraphTensor"]

Dtype = Literal["float16", "bfloat16", "float32"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GraphTensor(_Strict):
    """An input or output; a dimension is a number, or the name of one that a step chooses."""

    name: str
    dtype: Literal["float16", "bfloat16", "float32", "int32", "int64"]
    shape: tuple[int | str, ...]


class GraphParameter(_Strict):
    """A parameter of the base that fine-tunes may change.

    Attributes:
        name: the checkpoint's.
        kind: what it is; a gate is no tensor of the base, but the place where a fusion's gate of a block goes.
        shape: the base's.
        rows: the most that a fine-tune may bring; of a vocabulary more than the base's.
    """

    name: str
    kind: Literal["linear", "embedding", "vector", "gate"]
    shape: tuple[int, ...]
    rows: int


class GraphManifest(_Strict):
    """The exported graph.

    Attributes:
        dtype: of activations, weights and the cache.
        layers: decoder blocks.
        kv_heads: heads of the cache.
        head_dim: features of each.
        max_sequence: tokens that a row of the cache holds.
        max_rank: largest rank of a fine-tune's record.
        slots: fine-tunes that may be resident at a time.
        fusions: whether it has gates, and adds the LoRAs of fusions.
        delta_experts: how many of a fusion's first experts may be deltas.
        vocabulary: width of the logits, the most tokens that a fine-tune may have.
        base_vocabulary: the base's.
        tied: whether the base's lm_head is its embedding.
        inverse_frequencies: of the base's rotary embedding, [head_dim / 2].
        rotary_scale: what its sines and cosines are multiplied with.
        parameters: rows of the directory, in its order.
        inputs: of the graph.
        outputs: of the graph.
    """

    dtype: Dtype
    layers: int
    kv_heads: int
    head_dim: int
    max_sequence: int
    max_rank: int
    slots: int
    fusions: bool
    delta_experts: int
    vocabulary: int
    base_vocabulary: int
    tied: bool
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float
    parameters: tuple[GraphParameter, ...]
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
