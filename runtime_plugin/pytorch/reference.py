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
from deltaweave.runtime_plugin.pytorch.packed import DenseDelta, FactoredDelta

__all__ = ["delta_linear", "delta_rows", "dense_linear"]


def delta_linear(x: torch.Tensor, delta: FactoredDelta) -> torch.Tensor:
    """U^T (sigma * (V x)): what a factored delta adds to the output of its linear layer.

    Args:
        x: [..., in_features], any floating dtype.
        delta: of the layer's weight [out_features, in_features].

    Returns:
        [..., out_features] in the dtype of x, rounded once.

    Raises:
        FormatError: x has another number of features.
    """
    tokens = _tokens(x, delta.shape)
    y = tokens.new_zeros(len(tokens), delta.shape[0])
    for u, sigma, v in delta.blocks():
        h = sigma * (tokens @ v.T)
        y = y.addmm(h, u)
    return y.to(x.dtype).view(*x.shape[:-1], delta.shape[0])


def dense_linear(x: torch.Tensor, delta: DenseDelta) -> torch.Tensor:
    """D x: what a dense delta adds to the output of its linear layer; see `delta_linear`."""
    tokens = _tokens(x, delta.shape)
    y = torch.cat([tokens @ block.T for block in delta.blocks()], dim=1)
    return y.to(x.dtype).view(*x.shape[:-1], delta.shape[0])


def delta_rows(ids: torch.Tensor, delta: FactoredDelta | DenseDelta) -> torch.Tensor:
    """What a delta adds to rows of its matrix: the embedding's counterpart of `delta_linear`.

    Args:
        ids: [...] integer row numbers.
        delta: of a matrix [rows, columns].

    Returns:
        [..., columns] float32.
    """
    wanted = ids.reshape(-1)
    if isinstance(delta, DenseDelta):
        rows = delta.matrix.unpack(delta.matrix.bands[0], wanted)
    else:
        rows = delta.sigma.new_zeros(len(wanted), delta.shape[1])
        for u, sigma, v in delta.blocks():
            rows = rows.addmm((sigma[:, None] * u[:, wanted]).T, v)
    return rows.view(*ids.shape, delta.shape[1])


def _tokens(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The input as [tokens, in_features] float32, if it fits a delta of this shape."""
    if x.shape[-1] != shape[1]:
        raise FormatError(f"input of shape {list(x.shape)}, the delta has {shape[1]} in_features")
    return x.reshape(-1, shape[1]).float()
