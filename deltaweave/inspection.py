# SPDX-License-Identifier: Apache-2.0
"""What a delta or fusion file holds, as plain data: for `inspect`, for reports, and for anyone who asks from Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaweave.formats import (
    BaseRecord,
    Delta,
    DeltaReference,
    DenseRecord,
    Expert,
    FactoredRecord,
    FixedGate,
    Fusion,
    Lora,
    LoraReference,
    Record,
    ReplaceRecord,
    RowsRecord,
    dense_bytes,
    factored_bytes,
    published_alpha,
)

__all__ = ["ExpertSummary", "RecordSummary", "describe_gate", "summarize", "summarize_experts"]


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


@dataclass(frozen=True)
class ExpertSummary:
    """One expert of a fusion.

    Attributes:
        name: what it calls itself.
        kind: `lora`, inlined, or `reference` or `delta`, in a file of its own.
        ranks: of its matrices, rising; None if another file holds them.
        targets: kinds of layers that it changes (`q_proj`); None likewise.
        modules: number of layers that it changes; None likewise.
        bytes: stored in the fusion.
        path: name of that other file.
        header_sha256: digest of that file's header.
    """

    name: str
    kind: str
    ranks: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None
    modules: int | None = None
    bytes: int = 0
    path: str | None = None
    header_sha256: str | None = None


def summarize_experts(fusion: Fusion) -> list[ExpertSummary]:
    """The experts of a fusion as it was read, in the gate's order."""
    return [_expert(expert) for expert in fusion.experts]


def describe_gate(fusion: Fusion) -> dict[str, Any]:
    """A fusion's gate for machines: `kind`, and weights, or temperature, layers and hidden_size."""
    gate = fusion.gate
    if isinstance(gate, FixedGate):
        return {"kind": "fixed", "weights": list(gate.weights)}
    block = next(iter(gate.blocks.values()))
    return {
        "kind": "token",
        "layers": len(gate.blocks),
        "hidden_size": int(block.weight.data.shape[1]),
        "temperature": gate.temperature,
        "dtype": block.weight.dtype,
    }


def _expert(expert: Expert) -> ExpertSummary:
    if isinstance(expert, (LoraReference, DeltaReference)):
        kind = "reference" if isinstance(expert, LoraReference) else "delta"
        return ExpertSummary(expert.name, kind, path=expert.path, header_sha256=expert.header_sha256)
    if not isinstance(expert, Lora):
        return ExpertSummary(expert.name, "delta", path=expert.delta.path.name)
    matrices = expert.modules.values()
    return ExpertSummary(
        expert.name,
        "lora",
        ranks=tuple(sorted({matrix.rank for matrix in matrices})),
        targets=tuple(sorted({name.rpartition(".")[2] for name in expert.modules})),
        modules=len(matrices),
        bytes=sum(matrix.a.data.nbytes + matrix.b.data.nbytes for matrix in matrices),
    )


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
