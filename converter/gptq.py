# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): quantize a matrix column by column, spreading each column's error over those still to come.

The loop is one; what a column's grid is differs between the two factors of a delta, so that is a quantizer's business
(`converter/quantize.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
from deltaweave.converter.quantize import VectorsAsColumns, VectorsAsRows

__all__ = ["ColumnQuantizer", "gptq", "inverse_factor", "quantize_block"]

# Columns whose updates are applied at once to the rest of the matrix, as in the GPTQ paper; the width of a GPU tile.
BLOCK = 128


class ColumnQuantizer(Protocol):
    """Turns one column into codes, keeps them, and says what they stand for."""

    def quantize(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """Quantizes column `column` (its natural index) of float32 values [rows]; returns the dequantized values."""
        ...


def inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, in the order of visits.

    Read backwards, the Hessian has a lower factor L; the inverse of L, read backwards again, is that upper factor. So
    no inverse is ever formed, and never more than two matrices of the Hessian's size are held beside it: at 11008
    columns each takes 485 MB.

    Args:
        hessian: [columns, columns] float32, positive semi-definite; left as it is. Columns that never saw an input
            count as independent of all others.
        order: [columns] int64, the permutation.
        damping: added to the diagonal, relative to its mean. Raised tenfold until the factorization succeeds.

    Returns:
        [columns, columns] float32 upper triangular R with inverse(permuted hessian) = R^T R.
    """
    backwards = order.flip(0)
    damped = hessian[backwards[:, None], backwards]
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    step = damping * float(diagonal.mean())
    added = 0.0
    while True:
        diagonal += step - added
        added = step
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
        step *= 10
    inverse = damped.zero_()
    inverse.diagonal().fill_(1)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower, damped, diagonal
    return inverse.flip(0, 1)


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
    quantize = _block_quantizer(quantizer, weight.device)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = quantize(quantizer, order[start:stop], weight[:, start:stop], factor[start:stop, start:stop])
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    result = torch.empty_like(weight)
    result[:, order] = weight
    return result


def quantize_block(
    quantizer: ColumnQuantizer, visits: torch.Tensor, block: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Quantizes the columns of a block in turn, each column's error spread over those still to come in the block.

    Args:
        quantizer: the grids.
        visits: [columns] int64, the columns' natural indices.
        block: [rows, columns] float32; becomes the dequantized values.
        factor: [columns, columns] float32, the inverse factor's block on the diagonal.

    Returns:
        [rows, columns] float32 errors, each over its column's diagonal entry, for the columns behind the block.
    """
    errors = torch.empty_like(block)
    for column, visit in enumerate(visits.tolist()):
        values = block[:, column]
        quantized = quantizer.quantize(visit, values)
        error = (values - quantized) / factor[column, column]
        block[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1)
        block[:, column] = quantized
        errors[:, column] = error
    return errors


def _block_quantizer(quantizer: ColumnQuantizer, device: torch.device) -> Callable[..., torch.Tensor]:
    """`quantize_block`, or on a GPU its equal in one kernel: a dozen launches a column would be most of the time."""
    if device.type == "cuda" and find_spec("triton"):
        from deltaweave.converter import gptq_triton

        if isinstance(quantizer, VectorsAsRows):
            return gptq_triton.quantize_rows
        if isinstance(quantizer, VectorsAsColumns) and gptq_triton.takes_columns(quantizer):
            return gptq_triton.quantize_columns
    return quantize_block
