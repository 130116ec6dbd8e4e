# SPDX-License-Identifier: Apache-2.0
"""A tenant's records as any host holds them: shapes for the library, bytes for an upload. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from deltaweave.formats import DenseRecord, FactoredRecord, PackedMatrix
from deltaweave.runtime_plugin import library
from numpy.typing import NDArray

__all__ = ["Content", "RecordImage", "Rows", "ServedRecord", "image_groups"]

# Where a part of a record begins in host memory, and a band within its codes, as in the file.
PART_ALIGNMENT, BAND_ALIGNMENT = 256, 16
# Records are copied and repacked in pieces of about so many bytes; two are on their way at a time.
PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class Rows:
    """Replaced rows of an embedding or lm_head.

    Attributes:
        indices: int32 [rows], rising.
        values: float16 [rows, in_features].
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float16]


# What a record brings: packed codes, replaced rows, or the values of a norm or bias (float32).
Content = FactoredRecord | DenseRecord | Rows | NDArray[np.float32]


@dataclass(frozen=True)
class ServedRecord:
    """One tenant's record of one parameter.

    Attributes:
        parameter: row of the table.
        content: None if it shares another record's bytes.
        shares: the parameter whose record that is.
    """

    parameter: int
    content: Content | None
    shares: int = -1

    def shape(self) -> library.Record:
        """What the library needs to place it."""
        content = self.content
        if content is None:
            return library.Record.shared(self.parameter, self.shares)
        if isinstance(content, FactoredRecord):
            sizes, offsets = (
                (content.v.group_size, content.u.group_size),
                (content.v.group_offset, content.u.group_offset),
            )
            return library.Record.factored(self.parameter, _bands(content.v), sizes, offsets)
        if isinstance(content, DenseRecord):
            matrix = content.matrix
            [(bits, rows, grid)] = _bands(matrix)
            return library.Record.dense(self.parameter, rows, bits, grid, matrix.group_size, matrix.group_offset)
        if isinstance(content, Rows):
            return library.Record.replaced_rows(self.parameter, len(content.indices))
        return library.Record.values(self.parameter)


@dataclass(frozen=True)
class RecordImage:
    """One record as the file has it.

    Attributes:
        arguments: of its repacking but for the addresses, so that an upload costs the host little.
        fields: byte offset of each part, by its name in `library.RepackArgs`.
        sources: (byte offset, bytes) of everything to be copied.
        size: bytes.
    """

    arguments: library.RepackArgs
    fields: Mapping[str, int]
    sources: Sequence[tuple[int, NDArray[np.uint8]]]
    size: int

    @classmethod
    def of(cls, record: ServedRecord, content: Content) -> RecordImage:
        """The image of a record that has bytes of its own."""
        fields: dict[str, int] = {}
        sources = []
        position = 0
        for field, alignment, arrays in _parts(content):
            fields[field] = position = _rounded(position, PART_ALIGNMENT)
            for array in arrays:
                position = _rounded(position, alignment)
                raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                sources.append((position, raw))
                position += raw.nbytes
        return cls(library.RepackArgs(record=record.shape()), fields, sources, _rounded(position, PART_ALIGNMENT))

    def write(self, target: NDArray[np.uint8]) -> None:
        """Fills uint8 [size]; gaps keep what they held."""
        for offset, raw in self.sources:
            np.copyto(target[offset : offset + raw.nbytes], raw)

    def repack_arguments(self, arena: library.Arena, slot: int, buffer: int, address: int) -> library.RepackArgs:
        """The call that brings the image into a slot; the arguments are one object, good until the next call.

        Args:
            arena: the bookkeeping, where the slot is committed.
            slot: of the tenant.
            buffer: device address of the arena.
            address: device address of the image.
        """
        arguments = self.arguments
        parameter = arguments.record.parameter
        place = arena.payload(slot, parameter)
        arguments.parameter = arena.parameters[parameter]
        arguments.payload, arguments.payload_bytes = buffer + place.offset, place.bytes
        for field, offset in self.fields.items():
            setattr(arguments, field, address + offset)
        return arguments


def image_groups(records: Sequence[ServedRecord]) -> Iterator[list[RecordImage]]:
    """Images of consecutive records, about PIECE_BYTES together; a larger record is a group of its own."""
    group: list[RecordImage] = []
    size = 0
    for record in records:
        if record.content is None:
            continue
        image = RecordImage.of(record, record.content)
        if group and size + image.size > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(image)
        size += image.size
    if group:
        yield group


def _parts(content: Content) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    """The parts of a record by their names in `library.RepackArgs`, how their arrays are aligned, and the arrays."""
    if isinstance(content, FactoredRecord):
        yield from _matrix_parts("v", content.v)
        yield from _matrix_parts("u", content.u)
        yield "sigma", PART_ALIGNMENT, [content.sigma]
        yield from _levels(content.v)
    elif isinstance(content, DenseRecord):
        yield from _matrix_parts("v", content.matrix)
        yield from _levels(content.matrix)
    elif isinstance(content, Rows):
        yield "indices", PART_ALIGNMENT, [content.indices]
        yield "values", PART_ALIGNMENT, [content.values]
    else:
        yield "values", PART_ALIGNMENT, [content]


def _matrix_parts(side: str, matrix: PackedMatrix) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    yield f"{side}_codes", BAND_ALIGNMENT, [piece.codes for piece in matrix.bands]
    grids = [piece.grid for piece in matrix.bands if piece.grid is not None]
    if grids:
        yield f"{side}_grid", 1, grids


def _levels(matrix: PackedMatrix) -> Iterator[tuple[str, int, list[NDArray[Any]]]]:
    levels = [np.array(piece.band.levels, np.float32) for piece in matrix.bands if piece.band.levels is not None]
    if levels:
        yield "levels", 1, levels


def _bands(matrix: PackedMatrix) -> list[tuple[int, int, str]]:
    return [(piece.band.bits, piece.band.rank, piece.band.grid) for piece in matrix.bands]


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
