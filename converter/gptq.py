# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): quantize a matrix column by column, spreading each column's error over those still to come.

The loop is one; what a column's grid is differs between the two factors of a delta, so that is a quantizer's business
(`converter/quantize.py`).
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["ColumnQuantizer", "gptq", "inverse_factor"]

# Columns whose updates are applied at once to the rest of the matrix, as in the GPTQ paper.
BLOCK = 128


class ColumnQuantizer(Protocol):
    """Turns one column into codes, keeps them, and says what they stand for."""

    def quantize(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """Quantizes column `column` (its natural index) of float32 values [rows]; returns the dequantized values."""
        ...


def inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, in the order of visits.

    Never holds more than two matrices of the Hessian's size beside it: at 11008 columns each takes 485 MB.

    Args:
        hessian: [columns, columns] float32, positive semi-definite; left as it is. Columns that never saw an input
            count as independent of all others.
        order: [columns] int64, the permutation.
        damping: added to the diagonal, relative to its mean. Raised tenfold until the factorization succeeds.

    Returns:
        [columns, columns] float32 upper triangular R with inverse(permuted hessian) = R^T R.
    """
    damped = hessian[order[:, None], order]
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    step = damping * float(diagonal.mean())
    added = 0.0
    while True:
        diagonal += step - added
        added = step
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
        step *= 10
    del damped, diagonal
    inverse = torch.cholesky_inverse(factor)
    del factor
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantizer: ColumnQuantizer,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
) -> torch.Tensor:
    """Quantizes `weight` so that `(weight - result) @ hessian @ (weight - result)^T` stays small.

    Args:
        weight: [rows, columns] float32; left as it is.
        hessian: [columns, columns] float32 second moment of the inputs that `weight` multiplies; left as it is.
        quantizer: the grids; visited once per column.
        damping: relative to the mean of the Hessian's diagonal.
        activation_order: visit columns by falling diagonal of the Hessian.

    Returns:
        [rows, columns] float32: the dequantized matrix. Columns that never saw an input (zero on the diagonal) are
        set to zero, as in the published code.
    """
    dead = hessian.diagonal() == 0
    order = torch.arange(weight.shape[1], device=weight.device)
    if activation_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    weight = weight[:, order]
    weight[:, dead[order]] = 0
    factor = inverse_factor(hessian, order, damping)
    visits = order.tolist()
    for start in range(0, len(visits), BLOCK):
        stop = min(start + BLOCK, len(visits))
        errors = torch.empty(weight.shape[0], stop - start, device=weight.device)
        for column in range(start, stop):
            values = weight[:, column]
            quantized = quantizer.quantize(visits[column], values)
            error = (values - quantized) / factor[column, column]
            weight[:, column + 1 : stop].addr_(error, factor[column, column + 1 : stop], alpha=-1)
            weight[:, column] = quantized
            errors[:, column - start] = error
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    result = torch.empty_like(weight)
    result[:, order] = weight
    return result
