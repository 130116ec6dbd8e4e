# SPDX-License-Identifier: Apache-2.0
"""Where a delta file's bytes go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaweave.formats.layout import padded
from deltaweave.formats.matrix import ByteCount, matrix_bytes
from deltaweave.formats.records import (
    DenseRecord,
    FactoredRecord,
    Record,
    ReplaceRecord,
    RowsRecord,
)

if TYPE_CHECKING:
    from deltaweave.formats.delta import Delta

__all__ = ["FileBytes", "count_bytes", "record_bytes"]


@dataclass(frozen=True)
class FileBytes:
    """Where a file's bytes go.

    Attributes:
        file: all of it, every shard.
        projections: stored tensors of the decoder's projections, padding included.
        other: stored tensors of everything else.
        carried: files that travel with it.
        header: headers, with their padding.
        codes: of `projections`, codes and fp16 values.
        grids: of `projections`, scales and zeros.
        sigma: of `projections`, singular values.
        padding: of `projections`.
        tuned_projections: 16-bit bytes of the projections that have a record.
    """

    file: int
    projections: int
    other: int
    carried: int
    header: int
    codes: int
    grids: int
    sigma: int
    padding: int
    tuned_projections: int


def record_bytes(record: Record) -> ByteCount:
    """Stored bytes of a record; exact values count as codes."""
    if isinstance(record, FactoredRecord):
        sigma = 4 * record.rank
        count = ByteCount(sigma=sigma, padding=padded(sigma) - sigma)
        for matrix in (record.u, record.v):
            count += matrix_bytes(record.bands, matrix.length, matrix.group_size, matrix.group_offset)
        return count
    if isinstance(record, DenseRecord):
        matrix = record.matrix
        return matrix_bytes([matrix.bands[0].band], matrix.length, matrix.group_size, matrix.group_offset)
    arrays = [record.values.data] if isinstance(record, (RowsRecord, ReplaceRecord)) else []
    arrays += [record.indices] if isinstance(record, RowsRecord) else []
    stored = sum(array.nbytes for array in arrays)
    return ByteCount(codes=stored, padding=sum(padded(array.nbytes) for array in arrays) - stored)


def count_bytes(delta: Delta) -> FileBytes:
    """The bytes of an open delta by kind."""
    projections, other, sixteen_bit = ByteCount(), ByteCount(), 0
    for name, record in delta.records():
        if is_projection(name, record):
            projections += record_bytes(record)
            sixteen_bit += 2 * record.shape[0] * record.shape[1]
        else:
            other += record_bytes(record)
    carried = sum(padded(file.bytes) for file in delta.header.files.values())
    size = delta.size
    return FileBytes(
        file=size,
        projections=projections.total,
        other=other.total,
        carried=carried,
        header=size - projections.total - other.total - carried,
        codes=projections.codes,
        grids=projections.grids,
        sigma=projections.sigma,
        padding=projections.padding,
        tuned_projections=sixteen_bit,
    )


def is_projection(name: str, record: Record) -> bool:
    """Whether a record is of a decoder projection, rather than of an embedding, lm_head, norm or bias."""
    return len(record.shape) == 2 and not name.startswith("lm_head.") and "embed_tokens" not in name
