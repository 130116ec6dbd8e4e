# SPDX-License-Identifier: Apache-2.0
"""What a compression will cost: time from counted operations and measured rates, memory, disk, size."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from deltaweave.converter.calibration import CHUNK_TOKENS, compute_dtype
from deltaweave.converter.checkpoint import EMBEDDING, HEAD
from deltaweave.converter.families import Projection
from deltaweave.converter.fidelity import LOGITS
from deltaweave.converter.plan import CompressionOptions, CompressionPlan
from deltaweave.converter.policies import other_bytes
from deltaweave.converter.sensitivity import MEASURED_TOKENS
from deltaweave.converter.text import HELD_OUT_TOKENS, default_sequence_length
from deltaweave.formats import factored_bytes

__all__ = ["Estimate", "estimate"]

# Symmetric eigenproblems do about this many operations per n^3 at a matrix product's rate (measured, LAPACK syevd).
EIGH_OPERATIONS = 45
# Time of one GPTQ column beside its matrix products, in seconds; on a GPU, of the kernel beside the next stage's SVD.
COLUMN_SECONDS = {"cpu": 1.2e-4, "cuda": 1.2e-5}
# Python, torch and transformers before any tensor, in bytes.
IDLE_BYTES = 450 * 10**6
# Compressions that a search for a quality takes as a rule.
USUAL_TRIES = 3
# Side of the product that measures a rate: large enough for launches not to count.
RATE_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Estimate:
    """Costs of a compression.

    Attributes:
        seconds: on the device that will be used, other load aside.
        memory_bytes: peak anonymous memory of the host (on a GPU, of the GPU).
        disk_bytes: output and unfinished work together, at their peak.
        projection_bytes: the projections' share of the output.
        file_bytes: the whole output, without its header.
        tries: compressions that `seconds` has in it: more than one where a quality is looked for, and then sizes are
            those that the search begins with.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    projection_bytes: int
    file_bytes: int
    tries: int


def estimate(plan: CompressionPlan, options: CompressionOptions) -> Estimate:
    """Counts operations and bytes of a compression; measures the device for a fraction of a second."""
    projections = sum(
        factored_bytes(p.shape, plan.bands[p.weight].bands, options.recipe.group_size).total for p in plan.projections
    )
    if options.recipe.allocated:  # spent to the last singular vector that fits
        projections = int(plan.recipe.ratio * plan.dense_bytes)
    others = sum(
        other_bytes(plan.base, plan.tuned, name, options.effective_policies, options.recipe.group_size)
        for name in plan.others
    )
    activations = (3 if _drifts(plan, options) else 2) * _activation_bytes(plan, options) if options.calibrated else 0
    searched = plan.recipe.max_kl is not None
    tries = USUAL_TRIES if searched else 1
    kept = 2 if searched else 1  # the best try lies beside the one that is being made
    return Estimate(
        seconds=_seconds_once(plan, options) + tries * _seconds(plan, options),
        memory_bytes=_memory(plan, options),
        disk_bytes=max(activations, _measured_bytes(plan, options))
        + _vector_bytes(plan)
        + (1 + kept) * projections
        + 2 * others,
        projection_bytes=projections,
        file_bytes=projections + others,
        tries=tries,
    )


def _drifts(plan: CompressionPlan, options: CompressionOptions) -> bool:
    """Whether the fine-tune's own activations are walked beside those behind compressed layers."""
    return options.calibrated and plan.recipe.correct_drift


def _tokens(plan: CompressionPlan, options: CompressionOptions) -> int:
    return options.samples * (options.sequence_length or default_sequence_length(plan.tuned.config))


def _measured_tokens(plan: CompressionPlan, options: CompressionOptions) -> int:
    """Tokens that pass through the model, forward and backward, before bits are chosen."""
    recipe = options.recipe
    measures = options.calibrated and recipe.allocated and recipe.sensitivity != "weight"
    return min(_tokens(plan, options), MEASURED_TOKENS) if measures else 0


def _measured_bytes(plan: CompressionPlan, options: CompressionOptions) -> int:
    """Every block's input and the last one's output, held while sensitivities are measured."""
    width = int(plan.tuned.config["hidden_size"]) * _measured_dtype(plan, options).itemsize
    return (len(plan.layers) + 1) * _measured_tokens(plan, options) * width


def _vector_bytes(plan: CompressionPlan) -> int:
    """Singular vectors that are kept so that no projection is decomposed twice."""
    again = plan.recipe.allocated or plan.recipe.max_kl is not None
    return sum(4 * min(p.shape) ** 2 for p in plan.projections) if again else 0


def _dtype(plan: CompressionPlan, options: CompressionOptions) -> torch.dtype:
    """Of activations."""
    if _drifts(plan, options):
        return torch.float32
    return compute_dtype(plan.tuned.dtype(EMBEDDING), options.torch_device)


def _product_dtype(plan: CompressionPlan, options: CompressionOptions) -> torch.dtype:
    """Of what the walks multiply."""
    on_gpu = options.torch_device.type == "cuda"
    return torch.float16 if on_gpu and _drifts(plan, options) else _dtype(plan, options)


def _measured_dtype(plan: CompressionPlan, options: CompressionOptions) -> torch.dtype:
    """Of activations that are differentiated."""
    on_gpu = options.torch_device.type == "cuda"
    return compute_dtype(plan.tuned.dtype(EMBEDDING), options.torch_device) if on_gpu else _dtype(plan, options)


def _activation_bytes(plan: CompressionPlan, options: CompressionOptions) -> int:
    return _tokens(plan, options) * int(plan.tuned.config["hidden_size"]) * _dtype(plan, options).itemsize


def _seconds_once(plan: CompressionPlan, options: CompressionOptions) -> float:
    """What is done once, however many ratios are tried: decompositions, and measuring what bits are chosen by."""
    device, recipe = options.torch_device, plan.recipe
    seconds = sum(_svd_operations(p) for p in plan.projections) / _rate(torch.float64, device)
    # Forward; forward again; and backward through the activations, which costs as much.
    measured = _rate(_measured_dtype(plan, options), device)
    seconds += 3 * _measured_tokens(plan, options) * _block_operations(plan) / measured
    if recipe.allocated:
        roundings = 1 + len(recipe.widths)
        moments = sum(2.0 * roundings * min(p.shape) * (p.shape[0] ** 2 + p.shape[1] ** 2) for p in plan.projections)
        seconds += moments / _rate(torch.float32, device)
    return seconds


def _seconds(plan: CompressionPlan, options: CompressionOptions) -> float:
    """Of one compression."""
    device = options.torch_device
    single, walked = _rate(torch.float32, device), _rate(_product_dtype(plan, options), device)
    stages = [stage for layer in plan.layers for stage in layer]
    seconds = 0.0
    if plan.recipe.max_kl is not None:
        seconds += HELD_OUT_TOKENS * _block_operations(plan) / single
    seconds += sum(4 * p.shape[0] * p.shape[1] * plan.bands[p.weight].rank for p in plan.projections) / single
    if options.calibrated:
        tokens = _tokens(plan, options)
        forward, moments = _served_operations(plan), sum(2.0 * tokens * _width(stage) ** 2 for stage in stages)
        if _drifts(plan, options):
            streams = [_width(stage) * stage[0].shape[0] for stage in stages if stage[0].closes_half]
            moments = 2 * moments + sum(2.0 * tokens * size for size in streams)
            forward += _block_operations(plan)
        seconds += moments / (walked if device.type == "cuda" else single)
        seconds += sum(_gptq_operations(plan, stage) for stage in stages) / single
        seconds += sum(_columns(plan, stage) for stage in stages) * COLUMN_SECONDS[device.type]
        seconds += tokens * forward / walked
    return seconds


def _width(stage: list[Projection]) -> int:
    return stage[0].shape[1]


def _svd_operations(projection: Projection) -> float:
    short, long = sorted(projection.shape)
    return 4.0 * long * short**2 + EIGH_OPERATIONS * short**3


def _columns(plan: CompressionPlan, stage: list[Projection]) -> int:
    return _width(stage) + sum(plan.bands[p.weight].rank for p in stage)


def _gptq_operations(plan: CompressionPlan, stage: list[Projection]) -> float:
    """Inverse factors, V's and U's updates, U's Hessian, and the two output errors."""
    width, total = _width(stage), 0.0
    for projection in stage:
        rank, out_features = plan.bands[projection.weight].rank, projection.shape[0]
        total += 3 * rank * width**2 + 2 * rank**3 + out_features * rank**2 + 4 * out_features * width**2
    return total + 3 * width**3


def _block_operations(plan: CompressionPlan) -> float:
    """Per token: every block once."""
    return sum(2.0 * p.shape[0] * p.shape[1] for p in plan.projections)


def _served_operations(plan: CompressionPlan) -> float:
    """Per token: a half's last stage needs the half up to it, the next half all of it."""
    total = 0.0
    for stage in (stage for layer in plan.layers for stage in layer):
        walks = 1 if stage[0].closes_half else 2
        total += walks * sum(2.0 * p.shape[0] * p.shape[1] for p in stage)
    return total


def _memory(plan: CompressionPlan, options: CompressionOptions) -> int:
    dtype, multiplied = _dtype(plan, options), _product_dtype(plan, options)
    layer, peak = plan.layers[0], 0
    converted = multiplied != plan.tuned.dtype(EMBEDDING)
    block = sum(p.shape[0] * p.shape[1] for stage in layer for p in stage) * multiplied.itemsize
    for stage in layer:
        weights = 4 * sum(p.shape[0] * p.shape[1] for p in stage)
        hessians = 4 * 4 * _width(stage) ** 2 if options.calibrated else 0
        gram = max(3 * 8 * min(p.shape) ** 2 for p in stage)
        peak = max(peak, 3 * weights + max(hessians, gram))
    forward = 0
    if options.calibrated:
        chunk = max(CHUNK_TOKENS[options.torch_device.type], options.sequence_length or 0)
        widest = max(max(p.shape) for stage in layer for p in stage)
        forward = chunk * widest * (4 * dtype.itemsize + 8)
    blocks = (2 if _drifts(plan, options) else 1) * block
    compressing = blocks * (2 if converted else 1) + max(peak, forward) + _beside(plan, options)
    return IDLE_BYTES + max(compressing, _fidelity_bytes(plan))


def _fidelity_bytes(plan: CompressionPlan) -> int:
    """Of measuring KL: a block in float32, or two heads and a few tables of logits."""
    if plan.recipe.max_kl is None:
        return 0
    head = 4 * math.prod(plan.tuned.shape(plan.tuned.resolve(HEAD) or HEAD))
    return max(4 * sum(p.shape[0] * p.shape[1] for stage in plan.layers[0] for p in stage), 2 * head + 4 * 8 * LOGITS)


def _beside(plan: CompressionPlan, options: CompressionOptions) -> int:
    """What a GPU holds beside: a stage read ahead; a layer's input; with drift corrected, the fine-tune's own too."""
    if options.torch_device.type != "cuda":
        return 0
    widest = max(sum(p.shape[0] * p.shape[1] for p in stage) for stage in plan.layers[0])
    kept = 2 if _drifts(plan, options) else 1 if options.calibrated else 0
    return 2 * 4 * widest + kept * _activation_bytes(plan, options)


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a square matrix product."""
    size = RATE_SIZE[device.type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
