# SPDX-License-Identifier: Apache-2.0
"""The reference ops: what a delta adds to a linear layer, from packed codes. Every kernel is held against these.

For tokens x [tokens, in_features] and a factored delta of rank r:

    h = sigma * (V x)     [tokens, r]
    y = U^T h             [tokens, out_features]

with U [r, out_features] and V [r, in_features] as the file stores them, one row per rank. All arithmetic is float32,
whatever the dtype of x. Only a few rows are unpacked at a time: no dense [out_features, in_features] weight is made.
"""

from __future__ import annotations

import torch
from deltaweave.formats import FormatError
from deltaweave.runtime_plugin.pytorch.packed import TorchDense, TorchFactored

__all__ = ["delta_linear", "delta_rows", "dense_linear", "factored_linear"]


def delta_linear(x: torch.Tensor, delta: TorchFactored | TorchDense) -> torch.Tensor:
    """What a delta adds to the output of its linear layer.

    Args:
        x: [..., in_features], any floating dtype.
        delta: of the layer's weight [out_features, in_features].

    Returns:
        [..., out_features] in the dtype of x, rounded once.

    Raises:
        FormatError: x has another number of features.
    """
    if x.shape[-1] != delta.shape[1]:
        raise FormatError(f"input with {x.shape[-1]} features, the delta expects {delta.shape[1]}")
    tokens = x.reshape(-1, x.shape[-1]).float()
    y = factored_linear(tokens, delta) if isinstance(delta, TorchFactored) else dense_linear(tokens, delta)
    return y.to(x.dtype).view(*x.shape[:-1], delta.shape[0])


def factored_linear(x: torch.Tensor, delta: TorchFactored) -> torch.Tensor:
    """y = U^T (sigma * (V x)) for x [tokens, in_features] float32; returns [tokens, out_features] float32."""
    y = x.new_zeros(x.shape[0], delta.shape[0])
    for u, sigma, v in delta.blocks():
        h = sigma * (x @ v.T)
        y = y.addmm(h, u)
    return y


def dense_linear(x: torch.Tensor, delta: TorchDense) -> torch.Tensor:
    """y = D x for x [tokens, in_features] float32; returns [tokens, out_features] float32."""
    return torch.cat([x @ block.T for _, block in delta.blocks()], dim=1)


def delta_rows(ids: torch.Tensor, delta: TorchFactored | TorchDense) -> torch.Tensor:
    """What a delta adds to rows of its matrix: the embedding's counterpart of `delta_linear`.

    Args:
        ids: [...] integer row numbers.
        delta: of a matrix [rows, columns].

    Returns:
        [..., columns] float32.
    """
    wanted = ids.reshape(-1)
    if isinstance(delta, TorchDense):
        rows = delta.matrix.unpack(delta.matrix.bands[0], wanted)
    else:
        rows = delta.sigma.new_zeros(len(wanted), delta.shape[1])
        for u, sigma, v in delta.blocks():
            rows = rows.addmm((sigma[:, None] * u[:, wanted]).T, v)
    return rows.view(*ids.shape, delta.shape[1])
