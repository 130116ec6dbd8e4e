# SPDX-License-Identifier: Apache-2.0
"""Random LoRAs and gates of a fusion as a runtime holds them, and what they compute, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from deltaweave.formats import ExactArray, LoraMatrix
from deltaweave.runtime_plugin.records import Mix
from numpy.typing import NDArray

__all__ = ["as_float64", "expected_term", "expected_weights", "random_loras", "random_mix"]


def exact(values: NDArray[np.float32], dtype: str) -> ExactArray:
    """Values rounded to a file's dtype."""
    if dtype == "BF16":
        return ExactArray(values.astype(ml_dtypes.bfloat16).view(np.uint16), "BF16")
    return ExactArray(values.astype(np.float16 if dtype == "F16" else np.float32), dtype)


def as_float64(array: ExactArray) -> NDArray[np.float64]:
    """What a file holds."""
    return array.to_float32().astype(np.float64)


def random_loras(
    generator: np.random.Generator,
    shape: tuple[int, int],
    ranks: Sequence[int],
    dtype: str = "BF16",
    size: float = 1.0,
) -> list[LoraMatrix | None]:
    """Experts of a layer [out, in], None for rank 0; terms of about `size` for inputs of about one."""
    experts: list[LoraMatrix | None] = []
    for rank in ranks:
        if rank == 0:
            experts.append(None)
            continue
        a = generator.standard_normal((rank, shape[1])) / np.sqrt(shape[1])
        b = size * generator.standard_normal((shape[0], rank)) / np.sqrt(rank)
        scale = float(generator.uniform(0.5, 2))
        experts.append(LoraMatrix(exact(a.astype(np.float32), dtype), exact(b.astype(np.float32), dtype), scale))
    return experts


def random_mix(generator: np.random.Generator, experts: int, hidden: int, gated: bool = True) -> Mix:
    """A gate, or fixed weights."""
    weight = (3 * generator.standard_normal((experts, hidden)) / np.sqrt(hidden)).astype(np.float32)
    bias = generator.uniform(-1, 1, experts).astype(np.float32)
    return Mix(weight if gated else None, bias, float(generator.uniform(0.8, 1.5)))


def expected_weights(x: NDArray[np.floating], mix: Mix | None) -> NDArray[np.float64]:
    """The gate of one token [8]."""
    weights = np.zeros(8)
    if mix is None:
        return weights
    bias = mix.bias.astype(np.float64)
    if mix.weight is not None:
        logits = mix.weight.astype(np.float64) @ x.astype(np.float64) / np.float32(mix.temperature)
        powers = np.exp(logits - logits.max())
        bias = bias + powers / powers.sum()
    weights[: len(bias)] = bias
    return weights


def expected_term(
    x: NDArray[np.floating], weights: NDArray[np.floating], experts: Sequence[LoraMatrix | None]
) -> NDArray[np.float64] | float:
    """What the experts add for one token [out]."""
    term: NDArray[np.float64] | float = 0.0
    for weight, matrix in zip(weights.astype(np.float64), experts, strict=False):
        if matrix is not None:
            term = term + weight * matrix.scale * (as_float64(matrix.b) @ (as_float64(matrix.a) @ x.astype(np.float64)))
    return term
