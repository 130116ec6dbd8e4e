# SPDX-License-Identifier: Apache-2.0
"""What a report shows of one delta, read once from its file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaweave.formats import Delta, FactoredRecord, FileBytes, Header
from deltaweave.inspection import RecordSummary, summarize

__all__ = ["DeltaDetails", "LayerError", "Spectrum", "read_details"]

PROJECTION = re.compile(r"\.(?P<layer>\d+)\.(?:.+\.)?(?P<kind>[^.]+)\.weight$")


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one projection's delta.

    Attributes:
        kind: such as `q_proj`.
        layer: index of the decoder block.
        sigma: [rank] float32, falling.
        bands: (bits, rank) of each band.
    """

    kind: str
    layer: int
    sigma: NDArray[np.float32]
    bands: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerError:
    """Recorded errors of one projection; None where none was recorded.

    Attributes:
        kind: such as `q_proj`.
        layer: index of the decoder block.
        weight: relative Frobenius error of the delta.
        output: relative error of the delta's output on calibration data.
    """

    kind: str
    layer: int
    weight: float | None
    output: float | None


@dataclass(frozen=True)
class DeltaDetails:
    """One delta file.

    Attributes:
        name: the file's name without its suffix.
        header: as stored.
        bytes: where the file's bytes go.
        records: one line per record.
        spectra: of every factored projection.
        errors: of every projection.
    """

    name: str
    header: Header
    bytes: FileBytes
    records: tuple[RecordSummary, ...]
    spectra: tuple[Spectrum, ...]
    errors: tuple[LayerError, ...]

    @property
    def method(self) -> str:
        """What made it."""
        return str(self.header.method["name"])

    @property
    def kinds(self) -> list[str]:
        """Kinds of projection in the file's order."""
        return list(dict.fromkeys(error.kind for error in self.errors))


def read_details(paths: Sequence[str | Path]) -> list[DeltaDetails]:
    """Reads delta files.

    Raises:
        FormatError: a damaged file.
    """
    details = []
    for path in paths:
        with Delta.open(path) as delta:
            details.append(_read(delta))
    return details


def _read(delta: Delta) -> DeltaDetails:
    records = tuple(summarize(delta))
    return DeltaDetails(
        name=delta.path.name.removesuffix(".index.json").removesuffix(".safetensors"),
        header=delta.header,
        bytes=delta.byte_count(),
        records=records,
        spectra=tuple(spectrum for record in records if (spectrum := _spectrum(delta, record))),
        errors=tuple(error for record in records if (error := _error(record))),
    )


def _spectrum(delta: Delta, summary: RecordSummary) -> Spectrum | None:
    place = PROJECTION.search(summary.name)
    record = delta.record(summary.name)
    if place is None or not isinstance(record, FactoredRecord):
        return None
    return Spectrum(place["kind"], int(place["layer"]), np.array(record.sigma), summary.bands)


def _error(summary: RecordSummary) -> LayerError | None:
    place = PROJECTION.search(summary.name)
    if place is None or summary.kind not in ("factored", "dense"):
        return None
    return LayerError(place["kind"], int(place["layer"]), summary.weight_error, summary.output_error)
