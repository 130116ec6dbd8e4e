# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the comparison, written for it: one-bit deltas as BitDelta describes them, and dequantization.

`bit_delta`: y[t] += scale[tenant] * (x[t] S) with S [in, out] of signs. A word packed[k, n] holds the signs of 32
neighbouring inputs 32 k .. 32 k + 31 of output n, lowest bit first; a set bit is +1. One program takes a tile of
outputs of one tenant and unpacks the words beside the loads (arXiv 2402.10193: a binary product batched over tenants).

`dequantize`: bf16 values of one band of a packed factor (factors.py), times the row's sigma where one is given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cases import GROUP_SIZE
from .factors import PackedBand

__all__ = ["bit_delta", "dequantize"]


@triton.jit
def _bit_delta_kernel(
    x, packed, scale, y, tokens, features, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    tenant = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x += (tenant * tokens + rows)[:, None] * features + depth[None, :]
    if ONCE:
        line = tl.arange(0, BLOCK_K // 32)[:, None, None]
        shifts = tl.arange(0, 32)[None, :, None]
        packed += tenant * (features // 32) * columns + line * columns + cols[None, None, :]
    else:
        shifts = (depth % 32)[:, None]
        packed += tenant * (features // 32) * columns + (depth // 32)[:, None] * columns + cols[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, features, BLOCK_K):
        tile = tl.load(x, mask=(rows < tokens)[:, None], other=0.0)
        words = tl.load(packed)
        signs = ((words >> shifts) & 1) * 2 - 1
        if ONCE:
            signs = tl.reshape(signs, (BLOCK_K, BLOCK_N))
        total += tl.dot(tile, signs.to(tile.dtype))
        x += BLOCK_K
        packed += (BLOCK_K // 32) * columns
    place = y + (tenant * tokens + rows)[:, None] * columns + cols[None, :]
    inside = (rows < tokens)[:, None] & (cols < columns)[None, :]
    total = total * tl.load(scale + tenant) + tl.load(place, mask=inside, other=0.0)
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


def bit_delta(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    block: tuple[int, int, int],
    once: bool,
    warps: int,
    stages: int,
) -> None:
    """Adds one-bit deltas.

    Args:
        x: [tenants, tokens, in_features], contiguous.
        packed: int32 [tenants, in_features / 32, out_features], contiguous.
        scale: float32 [tenants].
        y: [tenants, tokens, out_features], contiguous, read and written.
        block: tile of tokens, outputs and inputs; it divides outputs and inputs.
        once: load a word once and unpack it into 32 rows of the tile, or load it for each of them.
        warps: of a program.
        stages: of the loads.
    """
    tenants, tokens, features = x.shape
    columns = y.shape[2]
    if columns % block[1] or features % block[2]:
        raise ValueError(f"a tile of {block[1]} x {block[2]} does not divide {columns} x {features}")
    grid = (columns // block[1], tenants, triton.cdiv(tokens, block[0]))
    _bit_delta_kernel[grid](
        x, packed, scale, y, tokens, features, columns, *block, once, num_warps=warps, num_stages=stages
    )  # fmt: skip


@triton.jit
def _dequantize_kernel(
    codes, grid, sigma, out, length, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < length
    first_bit = column * BITS
    at = codes + row * row_bytes + (first_bit >> 3)
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    if BITS == 3:  # a code may reach into the next byte
        more = inside & ((first_bit >> 3) + 1 < row_bytes)
        word |= tl.load(at + 1, mask=more, other=0).to(tl.int32) << 8
    code = (word >> (first_bit & 7)) & ((1 << BITS) - 1)
    pair = grid + 2 * (row * groups + column // GROUP)
    scale = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32)
    value = scale * (code.to(tl.float32) - zero)
    if SCALED:
        value *= tl.load(sigma + row)
    tl.store(out + row * length + column, value.to(out.dtype.element_ty), mask=inside)


def dequantize(band: PackedBand, out: torch.Tensor, sigma: torch.Tensor | None) -> None:
    """Writes a band's values, out [rank, length] contiguous; sigma float32 [rank] multiplies the rows."""
    rank, row_bytes = band.codes.shape
    block = 1024
    _dequantize_kernel[(triton.cdiv(band.length, block), rank)](
        band.codes,
        band.grid,
        band.grid if sigma is None else sigma,
        out,
        band.length,
        row_bytes,
        band.grid.shape[1],
        BITS=band.bits,
        GROUP=GROUP_SIZE,
        SCALED=sigma is not None,
        BLOCK=block,
    )
