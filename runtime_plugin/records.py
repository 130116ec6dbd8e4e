# SPDX-License-Identifier: Apache-2.0
"""A tenant's records as any host holds them: shapes for the library, bytes for an upload. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from deltaweave.formats import DenseRecord, FactoredRecord, LoraMatrix, PackedMatrix
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.fit import AttachError
from numpy.typing import NDArray

__all__ = ["Content", "LoraStack", "Mix", "RecordImage", "Rows", "ServedRecord", "image_groups"]

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


@dataclass(frozen=True)
class LoraStack:
    """What the experts of a fusion add to one linear layer: y += sum_e w_e B_e (sigma_e * (A_e x)).

    Matrices are float16 times a power of two an expert that keeps the bits of small values; sigma undoes it. An expert
    that leaves the layer alone has rank 0.

    Attributes:
        a: [rank_e, in_features] float16 each.
        b: [rank_e, out_features] float16 each, the columns of B.
        sigma: float32 [all ranks], the expert's scale at each of its ranks.
    """

    a: tuple[NDArray[np.float16], ...]
    b: tuple[NDArray[np.float16], ...]
    sigma: NDArray[np.float32]

    @classmethod
    def of(cls, shape: tuple[int, int], experts: Sequence[LoraMatrix | None]) -> LoraStack:
        """From the LoRAs of a layer [out_features, in_features], one or None an expert.

        Raises:
            AttachError: more experts than the kernels take, none that has the layer, another shape, values that are
                not finite.
        """
        if not 1 <= len(experts) <= library.MAX_EXPERTS:
            raise AttachError(f"fusion of {len(experts)} experts, a runtime serves 1 to {library.MAX_EXPERTS}")
        if not any(experts):
            raise AttachError(f"none of {len(experts)} experts has a LoRA of the layer {list(shape)}")
        a, b, sigma = [], [], [np.zeros(0, np.float32)]
        for number, matrix in enumerate(experts):
            if matrix is None:
                a.append(np.zeros((0, shape[1]), np.float16))
                b.append(np.zeros((0, shape[0]), np.float16))
                continue
            if matrix.shape != shape:
                raise AttachError(f"expert {number}: a LoRA of shape {list(matrix.shape)}, the layer has {list(shape)}")
            down, down_power = _half_normalized(matrix.a.to_float32())
            up, up_power = _half_normalized(matrix.b.to_float32().T)
            a.append(down)
            b.append(up)
            scale = math.ldexp(matrix.scale, -down_power - up_power)
            sigma.append(np.full(matrix.rank, scale, np.float32))
        return cls(tuple(a), tuple(b), np.concatenate(sigma))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the experts."""
        return tuple(len(a) for a in self.a)


@dataclass(frozen=True)
class Mix:
    """How the gate of a decoder block weighs k experts: w = softmax(weight x / temperature) + bias.

    Attributes:
        weight: float32 [k, hidden_size], or None: then the bias is the weight of every token.
        bias: float32 [k].
        temperature: above zero.
    """

    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.bias) <= library.MAX_EXPERTS:
            raise AttachError(f"fusion of {len(self.bias)} experts, a runtime serves 1 to {library.MAX_EXPERTS}")
        if self.weight is not None and (self.weight.ndim != 2 or len(self.weight) != len(self.bias)):
            raise AttachError(f"gate of shape {list(self.weight.shape)} with a bias of {len(self.bias)} experts")

    def numbers(self) -> NDArray[np.float32]:
        """The bias, zeros up to the most experts, and the temperature: float32 [9]."""
        numbers = np.zeros(library.MAX_EXPERTS + 1, np.float32)
        numbers[: len(self.bias)] = self.bias
        numbers[-1] = self.temperature
        return numbers


# What a record brings: packed codes, replaced rows, the values of a norm or bias (float32), or a fusion's experts and
# their gate.
Content = FactoredRecord | DenseRecord | Rows | LoraStack | Mix | NDArray[np.float32]


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
        if isinstance(content, LoraStack):
            return library.Record.lora(self.parameter, content.ranks)
        if isinstance(content, Mix):
            return library.Record.mix(self.parameter, len(content.bias), content.weight is not None)
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
    elif isinstance(content, LoraStack):
        yield "v_codes", BAND_ALIGNMENT, list(content.a)
        yield "u_codes", BAND_ALIGNMENT, list(content.b)
        yield "sigma", PART_ALIGNMENT, [content.sigma]
    elif isinstance(content, Mix):
        yield "sigma", PART_ALIGNMENT, [content.numbers()]
        if content.weight is not None:
            yield "values", PART_ALIGNMENT, [content.weight]
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


def _half_normalized(values: NDArray[np.float32]) -> tuple[NDArray[np.float16], int]:
    """Values times 2^power in float16, the largest in [2^6, 2^7), and the power."""
    largest = float(np.abs(values).max())
    if not math.isfinite(largest):
        raise AttachError("a LoRA has values that are not finite")
    power = 7 - math.frexp(largest)[1] if largest > 0 else 0
    half: NDArray[np.float16] = np.ldexp(values.astype(np.float64), power).astype(np.float16)
    return np.ascontiguousarray(half), power


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
