# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The columns of one GPTQ block in one GPU kernel: what `gptq` does column by column, without a launch for each step.

Both kernels walk a block's columns in the order of visits and keep their rows' part of it in registers:

    w = tile[:, j];  q = the grid's value nearest to w;  e = (w - q) / R[j, j];  tile[:, j+1:] -= e R[j, j+1:]

Rows never meet but for the minimum and maximum that make U's grids, so a program takes 8 rows of V, or a group of U's.
The arithmetic is the torch code's, float32 with every operation rounded, so codes differ at most where a value lies
half-way between two. Imported only where there is a GPU: Triton comes with its torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from deltaweave.converter.quantize import SMALLEST_SCALE, VectorsAsColumns, VectorsAsRows

__all__ = ["MAX_GROUP", "quantize_columns", "quantize_rows", "takes_columns"]

# Columns of a tile. A power of two, not below `gptq.BLOCK`.
TILE_COLUMNS = 128
# Rows of V in a program: two for each of its four warps.
TILE_ROWS = 8
# The largest group of U whose tile, 128 columns wide, fits into one multiprocessor's registers.
MAX_GROUP = 256

# One build serves all matrices (`do_not_specialize`): each takes a second.
_LEAST = tl.constexpr(SMALLEST_SCALE)
# Adding 2^23 to a float32 in [0, 2^22] leaves no place for a fraction: rounds to nearest, ties to even.
_ROUNDER = tl.constexpr(float(1 << 23))


def quantize_rows(
    quantizer: VectorsAsRows, visits: torch.Tensor, block: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Quantizes a block of V's columns, as `gptq.quantize_block` does.

    Args:
        quantizer: takes the codes and values.
        visits: [columns] int64, the columns' natural indices; at most 128.
        block: [rows, columns] float32, unit stride in a row; becomes the dequantized values.
        factor: [columns, columns] float32, unit stride in a row: the upper triangle's block on the diagonal.

    Returns:
        [rows, columns] float32 errors, each over its column's diagonal entry.
    """
    rows, width = block.shape
    errors = block.new_empty(width, rows)  # a column is written at once
    result = quantizer.result
    _rows_kernel[(triton.cdiv(rows, TILE_ROWS),)](
        block,
        errors,
        factor,
        visits,
        quantizer.scale,
        quantizer.zero,
        quantizer.most,
        quantizer.exact,
        result.codes,
        result.values,
        rows,
        width,
        block.stride(0),
        factor.stride(0),
        result.codes.shape[1],
        result.group_size,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return errors.T


def takes_columns(quantizer: VectorsAsColumns) -> bool:
    """Whether `quantize_columns` can do it: min-max grids, in groups that fit into registers."""
    return quantizer.fit == "min-max" and quantizer.result.group_size <= MAX_GROUP


def quantize_columns(
    quantizer: VectorsAsColumns, visits: torch.Tensor, block: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Quantizes a block of U's columns and fits their grids on the way; arguments as in `quantize_rows`."""
    rows, width = block.shape
    columns = block.T.contiguous()  # [columns, rows]: a group's rows side by side, as the threads of a warp are
    errors = torch.empty_like(columns)
    result = quantizer.result
    group_rows = triton.next_power_of_2(result.group_size)
    _columns_kernel[(triton.cdiv(rows, result.group_size),)](
        columns,
        errors,
        factor,
        visits,
        quantizer.bits,
        result.codes,
        result.values,
        result.grid,
        rows,
        width,
        factor.stride(0),
        result.grid.shape[1],
        result.group_size,
        GROUP=group_rows,
        COLUMNS=TILE_COLUMNS,
        num_warps=max(1, group_rows // 16),
        enable_fp_fusion=False,
    )
    block.copy_(columns.T)
    return errors.T


@triton.jit
def _code(values, scale, zero, most):
    """round(values / scale + zero) within [0, most]; clamped first, which comes to the same and keeps it small."""
    place = tl.minimum(tl.maximum(tl.div_rn(values, scale) + zero, 0.0), most)
    return (place + _ROUNDER) - _ROUNDER


@triton.jit(do_not_specialize=["rows", "width", "block_stride", "factor_stride"])
def _rows_kernel(
    block,  # [rows, width] float32
    errors,  # [width, rows] float32
    factor,  # [width, width] float32
    visits,  # [width] int64
    scales,  # [groups, rows] float32
    zeros,  # [groups, rows] float32
    mosts,  # [rows] float32, the largest code
    exacts,  # [rows] bool, 16-bit rows
    codes,  # [rows, length] uint8
    values,  # [rows, length] float32
    rows,
    width,
    block_stride,
    factor_stride,
    length,
    group_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < rows
    inside = live[:, None] & (column < width)[None, :]
    wide_row = row.to(tl.int64)
    tile = tl.load(
        block + wide_row[:, None] * block_stride + column[None, :], mask=inside, other=0.0
    )  # [ROWS, COLUMNS]
    most = tl.load(mosts + row, mask=live, other=1.0)
    exact = tl.load(exacts + row, mask=live, other=0) != 0
    for j in range(width):
        visit = tl.load(visits + j)
        group = visit // group_size
        scale = tl.load(scales + group * rows + row, mask=live, other=1.0)
        zero = tl.load(zeros + group * rows + row, mask=live, other=0.0)
        value = tl.sum(tl.where((column == j)[None, :], tile, 0.0), 1)
        code = _code(value, scale, zero, most)
        quantized = tl.where(exact, value.to(tl.float16).to(tl.float32), scale * (code - zero))
        tl.store(codes + wide_row * length + visit, code.to(tl.uint8), mask=live)
        tl.store(values + wide_row * length + visit, quantized, mask=live)
        share = tl.div_rn(value - quantized, tl.load(factor + j * factor_stride + j))
        tl.store(block + wide_row * block_stride + j, quantized, mask=live)
        tl.store(errors + j * rows + row, share, mask=live)
        rest = tl.load(factor + j * factor_stride + column, mask=(column > j) & (column < width), other=0.0)
        tile -= share[:, None] * rest[None, :]


@triton.jit(do_not_specialize=["rows", "width", "factor_stride"])
def _columns_kernel(
    columns,  # [width, rows] float32
    errors,  # [width, rows] float32
    factor,  # [width, width] float32
    visits,  # [width] int64
    widths,  # [rank] int64, bits of every vector
    codes,  # [rank, rows] uint8
    values,  # [rank, rows] float32
    grids,  # [rank, groups, 2] float16
    rows,
    width,
    factor_stride,
    groups,
    group_size,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0)
    member = tl.arange(0, GROUP)
    row = group * group_size + member
    column = tl.arange(0, COLUMNS)
    live = (member < group_size) & (row < rows)
    count = tl.minimum(group_size, rows - group * group_size).to(tl.float32)
    inside = (column < width)[:, None] & live[None, :]
    # [COLUMNS, GROUP]; rows beyond the group stay zero
    tile = tl.load(columns + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    for j in range(width):
        visit = tl.load(visits + j)
        bits = tl.load(widths + visit)
        value = tl.sum(tl.where((column == j)[:, None], tile, 0.0), 0)  # [GROUP]
        most = ((1 << tl.minimum(bits, 8)) - 1).to(tl.float32)
        low = tl.minimum(tl.min(value, 0), 0.0)
        high = tl.maximum(tl.max(value, 0), 0.0)
        step = tl.where(bits == 1, tl.div_rn(2.0 * tl.sum(tl.abs(value), 0), count), tl.div_rn(high - low, most))
        stored_scale = tl.maximum(step, _LEAST).to(tl.float16)
        scale = stored_scale.to(tl.float32)
        stored_zero = tl.where(bits == 1, 0.5, _code(-low, scale, 0.0, most)).to(tl.float16)
        zero = stored_zero.to(tl.float32)
        code = _code(value, scale, zero, most)
        quantized = tl.where(bits == 16, value.to(tl.float16).to(tl.float32), scale * (code - zero))
        share = tl.where(live, tl.div_rn(value - quantized, tl.load(factor + j * factor_stride + j)), 0.0)
        rest = tl.load(factor + j * factor_stride + column, mask=(column > j) & (column < width), other=0.0)
        tile -= rest[:, None] * share[None, :]
        tl.store(columns + j * rows + row, quantized, mask=live)
        tl.store(errors + j * rows + row, share, mask=live)
        tl.store(values + visit * rows + row, quantized, mask=live)
        tl.store(codes + visit * rows + row, code.to(tl.uint8), mask=live & (bits < 16))
        tl.store(grids + (visit * groups + group) * 2, stored_scale, mask=bits < 16)
        tl.store(grids + (visit * groups + group) * 2 + 1, stored_zero, mask=bits < 16)
