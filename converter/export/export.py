# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to `model.onnx` and its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from deltaweave.converter.checkpoint import EMBEDDING, Checkpoint
from deltaweave.converter.export.architecture import Decoder
from deltaweave.converter.export.decoder import GraphSizes, build_graph, graph_inputs, graph_outputs
from deltaweave.converter.export.errors import ExportError
from deltaweave.converter.export.manifest import Dtype, GraphManifest, GraphParameter
from deltaweave.converter.export.weights import WeightFile

__all__ = ["DATA_FILE", "MODEL_FILE", "ExportOptions", "export_decoder"]

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
PRODUCER = "deltaweave"
# Tokens that a fine-tune may add to the base's vocabulary where nobody says how many.
SPARE_TOKENS = 256
MAX_RANK, MAX_EXPERTS = 4096, 8
# Ranks that the LoRAs of a fusion have together, of a layer, where nobody says how many.
FUSION_RANK = 512
MAX_SEQUENCE, MAX_SLOTS = 1 << 20, 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """What the graph fixes.

    Attributes:
        dtype: of activations, weights and the cache; float32 is for checks on a CPU, engines are 16-bit.
        max_sequence: tokens that a row of the cache holds.
        slots: fine-tunes that may be resident at a time.
        max_rank: largest rank of a fine-tune's record; None for what the model's layers allow.
        vocabulary: the most tokens that a fine-tune may have; None for the base's and SPARE_TOKENS more.
        fusions: with gates and LoRAs of fusions.
        delta_experts: how many of a fusion's first experts may be deltas; each costs a product a group of layers.
    """

    dtype: Dtype = "float16"
    max_sequence: int = 4096
    slots: int = 64
    max_rank: int | None = None
    vocabulary: int | None = None
    fusions: bool = False
    delta_experts: int = 0


def export_decoder(
    base: Checkpoint | str | Path, folder: str | Path, options: ExportOptions, progress: Progress | None = None
) -> GraphManifest:
    """Writes a decoder's graph and weights; the graph last, so that what has one is whole.

    Args:
        base: the checkpoint, of a family in `FAMILIES`.
        folder: where `model.onnx` and `model.onnx.data` go; made if need be, older ones are replaced.
        options: see there.
        progress: called with (tensors written, tensors in all).

    Returns:
        What to feed the graph, and what comes out.

    Raises:
        ExportError: a family, setting or option that the graph cannot express.
        CheckpointError: a checkpoint that is damaged, lacks tensors, or has values that the dtype cannot hold.
    """
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    decoder = Decoder.of(checkpoint)
    sizes = _sizes(decoder, options)
    parameters = tuple(decoder.parameters(sizes.vocabulary, gates=sizes.fusions))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(decoder, sizes, parameters, folder, progress or (lambda done, total: None))
    return GraphManifest(
        dtype=sizes.dtype,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        max_sequence=sizes.max_sequence,
        max_rank=sizes.max_rank,
        slots=sizes.slots,
        fusions=sizes.fusions,
        delta_experts=sizes.delta_experts,
        vocabulary=sizes.vocabulary,
        base_vocabulary=decoder.vocabulary,
        tied=decoder.tied,
        inverse_frequencies=decoder.inverse_frequencies,
        rotary_scale=decoder.rotary_scale,
        parameters=parameters,
        inputs=tuple(graph_inputs(decoder, sizes, len(parameters))),
        outputs=tuple(graph_outputs(decoder, sizes)),
    )


def _sizes(decoder: Decoder, options: ExportOptions) -> GraphSizes:
    if options.dtype not in get_args(Dtype):
        raise ExportError(f"dtype {options.dtype!r}, expected one of {', '.join(get_args(Dtype))}")
    for name, value, most in (
        ("max_sequence", options.max_sequence, MAX_SEQUENCE),
        ("slots", options.slots, MAX_SLOTS),
    ):
        if not 1 <= value <= most:
            raise ExportError(f"{name} {value}, expected 1 to {most}")
    vocabulary = decoder.vocabulary + SPARE_TOKENS if options.vocabulary is None else options.vocabulary
    if vocabulary < decoder.vocabulary:
        raise ExportError(f"vocabulary {vocabulary}, the base has {decoder.vocabulary} tokens")
    if not 0 <= options.delta_experts <= MAX_EXPERTS * options.fusions:
        raise ExportError(
            f"delta_experts {options.delta_experts}, expected 0 to {MAX_EXPERTS}, and fusions where there are some"
        )
    linear = [p for p in decoder.parameters(vocabulary) if p.kind == "linear"]
    most = min(MAX_RANK, max(min(p.shape) for p in linear))
    most = max(most, FUSION_RANK) if options.fusions else most
    rank = most if options.max_rank is None else options.max_rank
    if not 1 <= rank <= MAX_RANK:
        raise ExportError(f"max_rank {rank}, expected 1 to {MAX_RANK}")
    return GraphSizes(
        dtype=options.dtype,
        max_sequence=options.max_sequence,
        max_rank=rank,
        slots=options.slots,
        vocabulary=vocabulary,
        fusions=options.fusions,
        delta_experts=options.delta_experts,
    )


def _write(
    decoder: Decoder, sizes: GraphSizes, parameters: tuple[GraphParameter, ...], folder: Path, progress: Progress
) -> None:
    names = [EMBEDDING, *(parameter.name for parameter in parameters if parameter.kind != "gate")]
    total = len(dict.fromkeys(map(decoder.checkpoint.resolve, names)))
    partial = {name: folder / f".{name}.partial" for name in (MODEL_FILE, DATA_FILE)}
    try:
        with partial[DATA_FILE].open("wb") as file:
            weights = WeightFile(file, DATA_FILE, sizes.dtype, lambda done: progress(done, total))
            model = build_graph(decoder, sizes, parameters, weights, PRODUCER)
            file.flush()
            os.fsync(file.fileno())
        with partial[MODEL_FILE].open("wb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        (folder / MODEL_FILE).unlink(missing_ok=True)  # its weights are about to go
        partial[DATA_FILE].replace(folder / DATA_FILE)
        partial[MODEL_FILE].replace(folder / MODEL_FILE)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
