# SPDX-License-Identifier: Apache-2.0
"""A decoder with hot-swappable fine-tunes as an ONNX graph: standard ops, and those of domain `deltaweave`.

`docs/export.md` is the reference of inputs, outputs and ops. A step reads `tokens` tokens of `batch` rows, writes their
keys and values into the cache in place, and gives each row's logits behind its last real token. Norms, biases,
embeddings and lm_head of the row's fine-tune are looked up by its slot, so the ops that do it stand where ONNX has ones
of its own. None of them can be said in ONNX (they read an arena), so there are no local functions of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from deltaweave.converter.checkpoint import EMBEDDING, HEAD
from deltaweave.converter.export.architecture import Decoder
from deltaweave.converter.export.graph import GraphBuilder
from deltaweave.converter.export.manifest import Dtype, GraphParameter, GraphTensor
from deltaweave.converter.export.weights import WeightFile

__all__ = ["GraphSizes", "build_graph", "graph_inputs", "graph_outputs"]

DIRECTORY_FIELDS = 48  # DW_DIRECTORY_FIELDS


@dataclass(frozen=True)
class GraphSizes:
    """What the graph fixes beside the model.

    Attributes:
        dtype: of activations, weights and the cache.
        max_sequence: tokens that a row of the cache holds.
        max_rank: largest rank of a fine-tune's record.
        slots: fine-tunes that may be resident at a time.
        vocabulary: the most tokens that a fine-tune may have.
        fusions: with gates and LoRAs of fusions.
        delta_experts: how many of a fusion's first experts may be deltas.
    """

    dtype: Dtype
    max_sequence: int
    max_rank: int
    slots: int
    vocabulary: int
    fusions: bool
    delta_experts: int


def graph_inputs(decoder: Decoder, sizes: GraphSizes, parameters: int) -> list[GraphTensor]:
    """The inputs; per-slot tables have the base's entry last."""
    rows = sizes.slots + 1
    fixed: list[tuple[str, str, tuple[int | str, ...]]] = [
        ("input_ids", "int64", ("batch", "tokens")),
        ("positions", "int64", ("batch", "tokens")),
        ("lengths", "int64", ("batch",)),
        ("last", "int64", ("batch",)),
        ("row_slots", "int32", ("batch",)),
        ("arena", "int64", ("arena_words",)),
        ("arena_address", "int64", (1,)),
        ("directory", "int64", (parameters, sizes.slots, DIRECTORY_FIELDS)),
        ("inverse_frequencies", "float32", (rows, decoder.head_dim // 2)),
        ("rotary_scale", "float32", (rows,)),
        ("vocabulary", "int64", (rows,)),
    ]
    if sizes.delta_experts:
        fixed.append(("expert_slots", "int32", (sizes.delta_experts, "batch")))
    return [GraphTensor.model_validate({"name": n, "dtype": d, "shape": s}) for n, d, s in fixed] + [
        GraphTensor(name=f"past_{what}_{layer}", dtype=sizes.dtype, shape=_cache_shape(decoder, sizes))
        for layer in range(decoder.layers)
        for what in ("key", "value")
    ]


def graph_outputs(decoder: Decoder, sizes: GraphSizes) -> list[GraphTensor]:
    """The outputs; the cache's lie where its inputs do."""
    return [
        GraphTensor(name="tokens", dtype="int64", shape=("batch", 1)),
        GraphTensor(name="logits", dtype="float32", shape=("batch", sizes.vocabulary)),
    ] + [
        GraphTensor(name=f"present_{what}_{layer}", dtype=sizes.dtype, shape=_cache_shape(decoder, sizes))
        for layer in range(decoder.layers)
        for what in ("key", "value")
    ]


def build_graph(
    decoder: Decoder,
    sizes: GraphSizes,
    parameters: Sequence[GraphParameter],
    weights: WeightFile,
    producer: str,
) -> onnx.ModelProto:
    """The whole model; writes the weights as it goes."""
    builder = _DecoderBuilder(decoder, sizes, parameters, weights)
    builder.build()
    inputs, outputs = graph_inputs(decoder, sizes, len(parameters)), graph_outputs(decoder, sizes)
    return builder.graph.model(f"{decoder.checkpoint.model_type} decoder", inputs, outputs, producer)


def _cache_shape(decoder: Decoder, sizes: GraphSizes) -> tuple[int | str, ...]:
    return ("batch", decoder.kv_heads, sizes.max_sequence, decoder.head_dim)


class _DecoderBuilder:
    """Adds the parts of a decoder to a graph. Values are names; in their shapes b is batch and t tokens."""

    def __init__(
        self, decoder: Decoder, sizes: GraphSizes, parameters: Sequence[GraphParameter], weights: WeightFile
    ) -> None:
        self.graph = GraphBuilder()
        self._decoder, self._sizes, self._weights = decoder, sizes, weights
        self._index = {parameter.name: index for index, parameter in enumerate(parameters)}
        self._arena = ["arena", "directory"]
        # TensorRT-RTX 1.6 copies what ops inside its fused regions share; an address survives that, and costs nothing.
        self._arena_address = ["arena_address", "directory"]

    def build(self) -> None:
        """Adds everything."""
        decoder, graph = self._decoder, self.graph
        self._lay_out()
        table = self._weight(EMBEDDING)
        (x,) = graph.plugin(
            "Embed", ["input_ids", table, self._slots, *self._arena_address], parameter=self._index[EMBEDDING]
        )  # [b, t, hidden]
        for layer in range(decoder.layers):
            x = self._block(layer, x)
        # Only each row's last token is wanted: [b, hidden].
        at = graph.node("Unsqueeze", ["last", graph.shape(1)])
        x = graph.node("GatherND", [x, at], batch_dims=1)
        x = self._norm("model.norm", x, "row_slots")
        self._head(x, table)

    def _lay_out(self) -> None:
        """What all blocks share: slots and plans, rotations, masks."""
        graph, slots = self.graph, self._sizes.slots
        self._slots = self._spread("row_slots")
        (self._plan,) = graph.plugin("Plan", [self._slots, "directory"])
        (self._row_plan,) = graph.plugin("Plan", ["row_slots", "directory"])
        self._expert_plans: list[str] = []  # of the deltas that are the experts at each place
        for place in range(self._sizes.delta_experts):
            rows = graph.node("Gather", ["expert_slots", graph.constant(place, np.int64)])
            self._expert_plans += graph.plugin("Plan", [self._spread(rows), "directory"])
        bare = graph.node("Less", ["row_slots", graph.constant(0, np.int32)])
        wide = graph.cast("row_slots", "int64")
        self._entry = graph.node("Where", [bare, graph.constant(slots, np.int64), wide])  # [b], of per-slot tables
        self._cosines, self._sines = self._rotations()
        self._masks = {window: self._mask(window) for window in dict.fromkeys(self._decoder.windows)}

    def _spread(self, rows: str) -> str:
        """A number a row, [b], as one a token, [b * t]."""
        graph = self.graph
        column = graph.node("Unsqueeze", [rows, graph.shape(1)])
        spread = graph.node("Expand", [column, graph.node("Shape", ["input_ids"])])
        return graph.node("Reshape", [spread, graph.shape(-1)])

    def _rotations(self) -> tuple[str, str]:
        """Cosines and sines [b, t, head_dim / 2], in float32 up to the last rounding as in Transformers."""
        graph = self.graph
        frequencies = graph.node("Gather", ["inverse_frequencies", self._entry])
        frequencies = graph.node("Unsqueeze", [frequencies, graph.shape(1)])
        positions = graph.node("Unsqueeze", [graph.cast("positions", "float32"), graph.shape(2)])
        angles = graph.node("Mul", [positions, frequencies])
        scale = graph.node("Unsqueeze", [graph.node("Gather", ["rotary_scale", self._entry]), graph.shape(1, 2)])
        cosines, sines = (
            graph.cast(graph.node("Mul", [graph.node(function, [angles]), scale]), self._sizes.dtype)
            for function in ("Cos", "Sin")
        )
        return cosines, sines

    def _mask(self, window: int | None) -> str:
        """Which places of the cache a token sees, bool [b, 1, t, max_sequence]."""
        graph = self.graph
        places = graph.constant(np.arange(self._sizes.max_sequence), np.int64)
        positions = graph.node("Unsqueeze", ["positions", graph.shape(1, 3)])
        seen = graph.node("LessOrEqual", [places, positions])
        if window is None or window >= self._sizes.max_sequence:
            return seen
        first = graph.node("Sub", [positions, graph.constant(window, np.int64)])
        return graph.node("And", [seen, graph.node("Greater", [places, first])])

    def _block(self, layer: int, x: str) -> str:
        """One decoder block, [b, t, hidden] to the same."""
        graph, name = self.graph, f"model.layers.{layer}"
        if self._sizes.fusions:  # what each token gives its experts, by the block's input: [b * t, 8]
            inputs = [x, self._slots, *self._arena_address]
            (self._expert_weights,) = graph.plugin("Gate", inputs, parameter=self._index[name])
        attended = self._attention(layer, f"{name}.self_attn", self._norm(f"{name}.input_layernorm", x, self._slots))
        x = graph.node("Add", [x, attended])
        fed = self._mlp(f"{name}.mlp", self._norm(f"{name}.post_attention_layernorm", x, self._slots))
        return graph.node("Add", [x, fed])

    def _attention(self, layer: int, name: str, x: str) -> str:
        decoder, graph = self._decoder, self.graph
        q, k, v = self._linears(x, [f"{name}.{kind}" for kind in ("q_proj", "k_proj", "v_proj")])
        q = self._heads(q, decoder.heads, f"{name}.q_norm")
        k = self._heads(k, decoder.kv_heads, f"{name}.k_norm")
        v = self._heads(v, decoder.kv_heads)
        keys, values = (
            graph.node(
                "TensorScatter",
                [f"past_{what}_{layer}", new, "lengths"],
                [f"present_{what}_{layer}"],
                axis=2,
                mode="linear",
            )
            for what, new in (("key", self._rotate(k)), ("value", v))
        )
        mask = self._masks[decoder.windows[layer]]
        y = graph.node("Attention", [self._rotate(q), keys, values, mask])
        y = graph.node("Transpose", [y], perm=[0, 2, 1, 3])
        y = graph.node("Reshape", [y, graph.shape(0, 0, decoder.heads * decoder.head_dim)])
        return self._linears(y, [f"{name}.o_proj"])[0]

    def _heads(self, x: str, heads: int, norm: str | None = None) -> str:
        """[b, t, heads * head_dim] to [b, heads, t, head_dim], with the family's norm of each head if it has one."""
        graph = self.graph
        x = graph.node("Reshape", [x, graph.shape(0, 0, heads, self._decoder.head_dim)])
        if norm is not None and f"{norm}.weight" in self._index:
            x = self._norm(norm, x, self._slots)
        return graph.node("Transpose", [x], perm=[0, 2, 1, 3])

    def _rotate(self, x: str) -> str:
        return self.graph.node("RotaryEmbedding", [x, self._cosines, self._sines])

    def _mlp(self, name: str, x: str) -> str:
        graph = self.graph
        gate, up = self._linears(x, [f"{name}.gate_proj", f"{name}.up_proj"])
        gate = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
        return self._linears(graph.node("Mul", [gate, up]), [f"{name}.down_proj"])[0]

    def _norm(self, name: str, x: str, slots: str) -> str:
        weight = f"{name}.weight"
        inputs = [x, self._weight(weight), slots, *self._arena_address]
        return self.graph.plugin("RmsNorm", inputs, parameter=self._index[weight], epsilon=self._decoder.epsilon)[0]

    def _linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Linear layers that read the same x [b, t, in], each [b, t, out], with deltas and biases."""
        graph = self.graph
        weights = [f"{name}.weight" for name in names]
        ys = [graph.node("MatMul", [x, self._weight(weight, transposed=True)]) for weight in weights]
        ys = self._products(x, ys, [self._index[weight] for weight in weights])
        biased = [(place, f"{name}.bias") for place, name in enumerate(names) if f"{name}.bias" in self._index]
        if biased:
            inputs = [ys[place] for place, _ in biased] + [self._weight(bias) for _, bias in biased]
            parameters = [self._index[bias] for _, bias in biased]
            added = graph.plugin("AddBias", [*inputs, self._slots, *self._arena], len(biased), parameters=parameters)
            for (place, _), y in zip(biased, added, strict=True):
                ys[place] = y
        return ys

    def _products(self, x: str, ys: Sequence[str], parameters: Sequence[int]) -> list[str]:
        """What fine-tunes and fusions add to linear layers of a block."""
        graph, settings = self.graph, {"parameters": parameters, "max_rank": self._sizes.max_rank}
        found = graph.plugin("DeltaGemm", [x, *ys, self._plan, *self._arena], len(ys), **settings)
        if not self._sizes.fusions:
            return found
        weights = self._expert_weights
        found = graph.plugin("GatedLora", [x, *found, self._plan, *self._arena, weights], len(ys), **settings)
        for expert, plan in enumerate(self._expert_plans):
            inputs = [x, *found, plan, *self._arena, weights]
            found = graph.plugin("WeighedDelta", inputs, len(ys), **settings, expert=expert)
        return found

    def _head(self, x: str, table: str) -> None:
        """The logits of x [b, hidden]; what a fine-tune's vocabulary lacks is minus infinity."""
        graph, decoder, sizes = self.graph, self._decoder, self._sizes
        weight = table if decoder.tied else self._weight(HEAD)
        y = graph.node("Gemm", [x, weight], transB=1)
        if sizes.vocabulary > decoder.vocabulary:
            spare = graph.constant([0, 0, 0, sizes.vocabulary - decoder.vocabulary], np.int64)
            y = graph.node("Pad", [y, spare])
        settings = {"max_rank": sizes.max_rank}
        index = self._index[HEAD]
        (y,) = graph.plugin("DeltaGemm", [x, y, self._row_plan, *self._arena], parameters=[index], **settings)
        (y,) = graph.plugin("DenseGemm", [x, y, self._row_plan, *self._arena], parameter=index, **settings)
        known = graph.node("Unsqueeze", [graph.node("Gather", ["vocabulary", self._entry]), graph.shape(1)])
        present = graph.node("Less", [graph.constant(np.arange(sizes.vocabulary), np.int64), known])
        nothing = graph.constant(-np.inf, np.float32)
        logits = graph.node("Where", [present, graph.cast(y, "float32"), nothing], ["logits"])
        # The dimension is kept because TensorRT-RTX 1.6 aborts while it builds one that is dropped.
        graph.node("ArgMax", [logits], ["tokens"], axis=1, keepdims=1)

    def _weight(self, name: str, *, transposed: bool = False) -> str:
        stored = self._decoder.checkpoint.resolve(name)
        assert stored is not None  # every parameter was found when it was listed
        return self.graph.initializer(self._weights.add(self._decoder.checkpoint, stored, transposed=transposed))
