# SPDX-License-Identifier: Apache-2.0
"""What a delta file holds, as plain data: for `inspect`, for reports, and for anyone who asks from Python."""

from __future__ import annotations

from dataclasses import dataclass

from deltaweave.converter import published_alpha
from deltaweave.formats import (
    BaseRecord,
    Delta,
    DenseRecord,
    FactoredRecord,
    Record,
    ReplaceRecord,
    RowsRecord,
    dense_bytes,
    factored_bytes,
)

__all__ = ["RecordSummary", "summarize"]


@dataclass(frozen=True)
class RecordSummary:
    """One record.

    Attributes:
        name: the parameter.
        kind: `factored`, `dense`, `rows`, `replace` or `base`.
        shape: of the parameter.
        bands: (bits, rank) of each band; empty for records without codes.
        bytes: stored bytes, padding included.
        alpha: the paper's ratio, codes alone; None for records that are not factored.
        ratio: stored bytes over the parameter's 16-bit bytes.
        weight_error: relative Frobenius error of the delta, if recorded.
        output_error: relative error of the delta's output on the calibration data, if recorded.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bands: tuple[tuple[int, int], ...]
    bytes: int
    alpha: float | None
    ratio: float
    weight_error: float | None
    output_error: float | None

    @property
    def bands_text(self) -> str:
        """Bands as a user writes them, such as `8:2,3:32,2:893`."""
        return ",".join(f"{bits}:{rank}" for bits, rank in self.bands)


def summarize(delta: Delta) -> list[RecordSummary]:
    """All records of a delta, in the file's order."""
    return [_summary(name, delta.record(name)) for name in delta.names]


def _summary(name: str, record: Record) -> RecordSummary:
    kind, shape, bands, size, alpha = _describe(record)
    numbers = 1
    for extent in shape:
        numbers *= extent
    return RecordSummary(
        name=name,
        kind=kind,
        shape=shape,
        bands=bands,
        bytes=size,
        alpha=alpha,
        ratio=size / (2 * numbers) if numbers else 0.0,
        weight_error=record.quality.get("weight_error"),
        output_error=record.quality.get("output_error"),
    )


def _describe(
    record: Record,
) -> tuple[str, tuple[int, ...], tuple[tuple[int, int], ...], int, float | None]:
    if isinstance(record, FactoredRecord):
        bands = tuple(piece.band for piece in record.v.bands)
        size = factored_bytes(record.shape, bands, record.v.group_size or 0).total
        widths = tuple((band.bits, band.rank) for band in bands)
        return "factored", record.shape, widths, size, published_alpha(record.shape, bands)
    if isinstance(record, DenseRecord):
        bits = record.matrix.bands[0].band.bits
        size = dense_bytes(record.shape, bits, record.matrix.group_size).total
        return "dense", record.shape, ((bits, record.shape[0]),), size, None
    if isinstance(record, RowsRecord):
        return "rows", record.shape, (), record.indices.nbytes + record.values.data.nbytes, None
    if isinstance(record, ReplaceRecord):
        return "replace", tuple(record.values.data.shape), (), record.values.data.nbytes, None
    assert isinstance(record, BaseRecord)
    return "base", record.shape, (), 0, None
