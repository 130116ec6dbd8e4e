# SPDX-License-Identifier: Apache-2.0
"""Delta-CoMe on the decomposed projections of one stage (arXiv 2406.08903): V and U quantized in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deltaweave.converter.gptq import gptq
from deltaweave.converter.quantize import (
    QuantizedRows,
    VectorsAsColumns,
    VectorsAsRows,
    bits_of_ranks,
    round_to_nearest,
)
from deltaweave.converter.recipe import BandPlan, Recipe
from deltaweave.converter.svd import Factors
from deltaweave.formats import FactoredRecord

__all__ = ["CompressedProjection", "compress_stage"]

# Relative to the mean diagonal; keeps ranks that the calibration data hardly drives where the decomposition put them.
CORRECTION_RIDGE = 1e-4
# Beyond these factors a vector is noise, which making it longer would only make louder.
RESTORED = (0.5, 2.0)


@dataclass(frozen=True)
class CompressedProjection:
    """One projection's delta after compression.

    Attributes:
        record: what the file stores; None for a delta of zeros.
        delta: [out_features, in_features] float32, what the record stands for.
    """

    record: FactoredRecord | None
    delta: torch.Tensor


def compress_stage(
    deltas: Sequence[torch.Tensor],
    factors: Sequence[Factors],
    plans: Sequence[BandPlan],
    hessian: torch.Tensor | None,
    recipe: Recipe,
    lacking: Sequence[torch.Tensor] | None = None,
) -> list[CompressedProjection]:
    """Compresses projections that share their input.

    Args:
        deltas: [out_features, in_features] float32 each, the same in_features and device.
        factors: the leading part of each, with the rank of its plan or all that the delta has.
        plans: the bands of each.
        hessian: [in_features, in_features] float32 second moment of the shared input; None rounds to nearest.
        recipe: group size and GPTQ's settings.
        lacking: of each, [out_features, in_features] float32: what its output lacks beside `delta x`, times x^T, summed
            as the Hessian is; a corrected U makes it good as far as it can. None lacks nothing.
    """
    plans = [plan.truncated(factor.rank) for plan, factor in zip(plans, factors, strict=True)]
    vs = _quantize_v(factors, plans, hessian, recipe)
    lacks: Sequence[torch.Tensor | None] = lacking or [None] * len(plans)
    results = []
    for delta, factor, plan, v, lack in zip(deltas, factors, plans, vs, lacks, strict=True):
        if factor.rank == 0:
            results.append(CompressedProjection(None, torch.zeros_like(delta)))
            continue
        seen = delta if hessian is None else delta @ hessian
        u, target = _quantize_u(seen, factor, plan, v, hessian, lack, recipe)
        sigma = factor.sigma * _restored(u.values, target) if recipe.unbiased else factor.sigma
        approximation = u.values.T @ (sigma[:, None] * v.values)
        quality = {"energy_kept": factor.energy, **_errors(delta, seen, approximation, hessian)}
        shape = (delta.shape[0], delta.shape[1])
        record = FactoredRecord(shape, u.packed(plan.bands), v.packed(plan.bands), sigma.cpu().numpy(), quality)
        results.append(CompressedProjection(record, approximation))
    return results


def _quantize_v(
    factors: Sequence[Factors],
    plans: Sequence[BandPlan],
    hessian: torch.Tensor | None,
    recipe: Recipe,
) -> list[QuantizedRows]:
    """V of all projections at once: their rows are independent and share the Hessian, so one pass serves all."""
    vectors = torch.cat([factor.v for factor in factors])
    bits = torch.cat([bits_of_ranks(plan.bands) for plan in plans])
    if hessian is None or not len(bits):
        together = round_to_nearest(vectors, bits, recipe.group_size, recipe.grid)
    else:
        quantizer = VectorsAsRows(vectors, bits, recipe.group_size, recipe.grid)
        gptq(
            vectors,
            hessian,
            quantizer,
            damping=recipe.damping,
            activation_order=recipe.activation_order,
        )
        together = quantizer.result
    ends = torch.tensor([factor.rank for factor in factors]).cumsum(0).tolist()
    return [together[end - factor.rank : end] for factor, end in zip(factors, ends, strict=True)]


def _quantize_u(
    seen: torch.Tensor,
    factor: Factors,
    plan: BandPlan,
    v: QuantizedRows,
    hessian: torch.Tensor | None,
    lacking: torch.Tensor | None,
    recipe: Recipe,
) -> tuple[QuantizedRows, torch.Tensor]:
    """U against the input it will see at run time, `sigma * (V^ x)`; its Hessian follows from V^ without new data.

    `seen` is the delta times the Hessian. Also returns what U was quantized from, [out_features, rank].
    """
    bits = bits_of_ranks(plan.bands)
    basis = factor.sigma[:, None] * v.values
    u_hessian = basis @ basis.T if hessian is None else basis @ hessian @ basis.T
    target = factor.u
    if recipe.correct_target:
        if lacking is not None:
            seen = seen + lacking
        target = _corrected(factor.u, u_hessian, seen @ basis.T)
    if hessian is None:
        return round_to_nearest(target.T.contiguous(), bits, recipe.group_size, recipe.grid), target
    quantizer = VectorsAsColumns(target.shape[0], bits, recipe.group_size, target.device, recipe.grid)
    gptq(
        target,
        u_hessian,
        quantizer,
        damping=recipe.damping,
        activation_order=recipe.activation_order,
    )
    return quantizer.result, target


def _restored(quantized: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """By how much each quantized vector fell short of its target along the target, to be made up for by sigma.

    A grid's nearest values are shorter than what they stand for. Left so, every layer would pull back to the base a
    little, and over a model such errors add up where rounding's own cancel.

    Args:
        quantized: [rank, out_features].
        target: [out_features, rank].

    Returns:
        [rank], within `RESTORED`.
    """
    along = (quantized * target.T).sum(1)
    whole = target.square().sum(0)
    return torch.where(along > 0, whole / along.clamp_min(torch.finfo(along.dtype).tiny), 1.0).clamp(*RESTORED)


def _corrected(u: torch.Tensor, u_hessian: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The U that makes most of a quantized V: least squares of the output on `h = sigma * (V^ x)`, drawn to `u`.

    Args:
        u: [out_features, rank] as decomposed.
        u_hessian: [rank, rank], sum of h h^T.
        products: [out_features, rank], sum of y h^T, y being what the delta is to add to the output.
    """
    moment = u_hessian.double()
    ridge = CORRECTION_RIDGE * float(moment.diagonal().mean())
    moment.diagonal().add_(ridge)
    corrected: torch.Tensor = torch.linalg.solve(moment, (products.double() + ridge * u.double()).T).T.float()
    return corrected


def _errors(
    delta: torch.Tensor, seen: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor | None
) -> dict[str, float]:
    """Relative Frobenius error of the delta and, with a Hessian, of its output on the calibration data."""
    error = delta - approximation
    errors = {"weight_error": _ratio(error.square().sum(), delta.square().sum())}
    if hessian is not None:
        errors["output_error"] = _ratio(((error @ hessian) * error).sum(), (seen * delta).sum())
    return errors


def _ratio(error: torch.Tensor, whole: torch.Tensor) -> float:
    return float((error.double().clamp_min(0) / whole.double()).sqrt()) if float(whole) > 0 else 0.0
