# SPDX-License-Identifier: Apache-2.0
"""Codes of 1, 2, 3, 4 or 8 bits as dense little-endian bit streams, one per row (SPEC.md, "Codes")."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODE_BITS", "code_columns", "pack_codes", "row_bytes", "unpack_codes"]

CODE_BITS = (1, 2, 3, 4, 8)
# Codes handled at a time: bounds temporaries at a few hundred MB whatever the matrix.
BLOCK_CODES = 1 << 24


def row_bytes(bits: int, length: int) -> int:
    """Bytes of one row of `length` values; 16 means fp16 values instead of codes."""
    return -(-bits * length // 8)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs codes.

    Args:
        codes: [rows, length] uint8, every code below 2^bits.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        [rows, row_bytes(bits, length)] uint8; spare bits of a row's last byte are zero.

    Raises:
        ValueError: another bit width, or a code that does not fit.
    """
    _require_code_bits(bits)
    codes = np.ascontiguousarray(codes, dtype=np.uint8)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes
    rows, length = codes.shape
    packed = np.empty((rows, row_bytes(bits, length)), dtype=np.uint8)
    for start, stop in _row_blocks(rows, length):
        packed[start:stop] = _pack_block(codes[start:stop], bits)
    return packed


def unpack_codes(packed: NDArray[np.uint8], bits: int, length: int) -> NDArray[np.uint8]:
    """Undoes `pack_codes`.

    Args:
        packed: [rows, row_bytes(bits, length)] uint8.
        bits: 1, 2, 3, 4 or 8.
        length: codes a row.

    Returns:
        [rows, length] uint8.
    """
    _require_code_bits(bits)
    if bits == 8:
        return packed
    rows = packed.shape[0]
    codes = np.empty((rows, length), dtype=np.uint8)
    for start, stop in _row_blocks(rows, length):
        codes[start:stop] = _unpack_block(packed[start:stop], bits, length)
    return codes


def code_columns(packed: NDArray[np.uint8], bits: int, length: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Columns [start, stop) of packed codes, packed; of bytes alone where they begin at one.

    Args:
        packed: [rows, row_bytes(bits, length)] uint8.
        bits: 1, 2, 3, 4 or 8.
        length: codes a row.
        start: first column.
        stop: one past the last.
    """
    _require_code_bits(bits)
    if start * bits % 8:
        return pack_codes(unpack_codes(packed, bits, length)[:, start:stop], bits)
    part = packed[:, start * bits // 8 : row_bytes(bits, stop)].copy()
    if spare := -stop * bits % 8:
        part[:, -1] &= np.uint8(0xFF >> spare)
    return part


def _pack_block(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Eight codes fill `bits` bytes exactly, so every byte is an OR of codes at fixed shifts."""
    rows, length = codes.shape
    padded = np.zeros((rows, -(-length // 8), 8), dtype=np.uint8)
    padded.reshape(rows, -1)[:, :length] = codes
    octets = np.zeros((rows, padded.shape[1], bits), dtype=np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        octets[..., byte] |= padded[..., place] << np.uint8(shift)
        if shift + bits > 8:
            octets[..., byte + 1] |= padded[..., place] >> np.uint8(8 - shift)
    return octets.reshape(rows, -1)[:, : row_bytes(bits, length)]


def _unpack_block(packed: NDArray[np.uint8], bits: int, length: int) -> NDArray[np.uint8]:
    rows, width = packed.shape
    octets = np.zeros((rows, -(-length // 8), bits), dtype=np.uint8)
    octets.reshape(rows, -1)[:, :width] = packed
    codes = np.empty((rows, octets.shape[1], 8), dtype=np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = octets[..., byte] >> np.uint8(shift)
        if shift + bits > 8:
            code |= octets[..., byte + 1] << np.uint8(8 - shift)
        codes[..., place] = code & mask
    return codes.reshape(rows, -1)[:, :length]


def _row_blocks(rows: int, length: int) -> list[tuple[int, int]]:
    step = max(1, BLOCK_CODES // max(1, length))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _require_code_bits(bits: int) -> None:
    if bits not in CODE_BITS:
        raise ValueError(f"{bits} bits, expected one of {', '.join(map(str, CODE_BITS))}")
