# SPDX-License-Identifier: Apache-2.0
"""An arena without a model, on the CPU or a GPU, and random records for its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from deltaweave.formats import Band, DenseRecord, FactoredRecord, PackedBand, PackedMatrix, row_bytes
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.library import DIRECTORY_FIELDS, Parameter, ParameterKind
from deltaweave.runtime_plugin.pytorch import ops
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.pytorch.upload import DeviceUploader, HostUploader
from deltaweave.runtime_plugin.records import Content, ServedRecord

__all__ = [
    "BIAS",
    "EMBEDDING",
    "GATE",
    "HEAD",
    "IN",
    "LINEAR",
    "MAX_RANK",
    "NORM",
    "OTHER",
    "OUTS",
    "PARAMETERS",
    "SLOTS",
    "SPARE",
    "OpArena",
    "random_band",
    "random_dense",
    "random_factored",
    "random_matrix",
    "slots_of",
]

IN, OUTS, SPARE = 200, (136, 72), 90
LINEAR, OTHER, EMBEDDING, HEAD, NORM, BIAS, GATE = range(7)
PARAMETERS = [
    Parameter(ParameterKind.LINEAR, IN, OUTS[0]),
    Parameter(ParameterKind.LINEAR, IN, OUTS[1]),
    Parameter(ParameterKind.EMBEDDING, IN, SPARE),
    Parameter(ParameterKind.LINEAR, IN, SPARE),
    Parameter(ParameterKind.VECTOR, IN, 1),
    Parameter(ParameterKind.VECTOR, OUTS[0], 1),
    Parameter(ParameterKind.GATE, IN, 1),
]
SLOTS = 3
MAX_RANK = 256


def random_matrix(
    generator: np.random.Generator, bands: Sequence[Band], length: int, group_size: int | None = 128
) -> PackedMatrix:
    """Values of about 1 / sqrt(length); `length` must be a multiple of 8."""
    size = 1 / np.sqrt(length)
    pieces = []
    for band in bands:
        if band.bits == 16:
            values = size * generator.standard_normal((band.rank, length), dtype=np.float32)
            pieces.append(PackedBand(band, values.astype(np.float16), None))
            continue
        codes = generator.integers(0, 256, (band.rank, row_bytes(band.bits, length)), dtype=np.uint8)
        entries = (1,) if group_size is None else (band.rank, -(-length // group_size))
        scale = size * generator.uniform(1, 2, entries)
        if band.grid == "codebook":
            pieces.append(PackedBand(band, codes, scale.astype(np.float16)))
            continue
        top = (1 << band.bits) - 1
        grid = np.stack([2 * scale / top, top * generator.uniform(0.4, 0.6, entries)], axis=-1)
        pieces.append(PackedBand(band, codes, (grid[0] if group_size is None else grid).astype(np.float16)))
    return PackedMatrix(tuple(pieces), length, group_size)


def random_band(generator: np.random.Generator, bits: int, rank: int, codebook: bool = False) -> Band:
    """A band; levels of a codebook are such as float16 holds, for an arena keeps them so."""
    if bits == 16:
        return Band(16, rank, "none")
    if not codebook:
        return Band(bits, rank)
    levels = np.sort(generator.standard_normal(1 << bits)).astype(np.float16)
    return Band(bits, rank, "codebook", tuple(levels.astype(float).tolist()))


def random_factored(
    generator: np.random.Generator, shape: tuple[int, int], bands: Sequence[Band], group_size: int = 128
) -> FactoredRecord:
    """A record of a matrix [out, in]."""
    u, v = (random_matrix(generator, bands, length, group_size) for length in shape)
    return FactoredRecord(shape, u, v, generator.uniform(0, 1, u.rows).astype(np.float32))


def random_dense(
    generator: np.random.Generator, shape: tuple[int, int], bits: int = 8, group_size: int | None = 128
) -> DenseRecord:
    """A low-bit delta of a whole matrix."""
    return DenseRecord(shape, random_matrix(generator, [Band(bits, shape[0])], shape[1], group_size))


def slots_of(slots: Sequence[int], device: str = "cpu") -> torch.Tensor:
    """Slots as the ops take them."""
    return torch.tensor(slots, dtype=torch.int32, device=device)


class OpArena:
    """Buffer, directory and bookkeeping."""

    def __init__(self, device: str = "cpu") -> None:
        whole = torch.full((4 << 20,), 0xA5, dtype=torch.uint8, device=device)
        self.buffer = whole[-whole.data_ptr() % 256 :]
        self.directory = torch.zeros(len(PARAMETERS), SLOTS, DIRECTORY_FIELDS, dtype=torch.int64, device=device)
        self._uploader = (HostUploader if device == "cpu" else DeviceUploader)(self.buffer)
        self._book = library.Arena(
            native_library(),
            device_address=self.buffer.data_ptr(),
            size=len(self.buffer),
            slots=SLOTS,
            parameters=PARAMETERS,
            max_rank=MAX_RANK,
        )

    def reserve(self, shapes: Sequence[library.Record]) -> int:
        """Takes a slot for records that are never filled."""
        return self._book.reserve(shapes)

    def add(self, records: Mapping[int, Content | torch.Tensor]) -> int:
        """Makes records, by parameter, a tenant; its slot."""
        served = [
            ServedRecord(parameter, content.numpy() if isinstance(content, torch.Tensor) else content)
            for parameter, content in records.items()
        ]
        slot = self._book.reserve([record.shape() for record in served])
        self._book.commit(slot)
        self._uploader.upload(self._uploader.hold(served), self._book, slot).wait()
        self.directory[:, slot] = torch.tensor(self._book.directory_rows(slot)).to(self.directory)
        return slot

    def plan(self, slots: torch.Tensor) -> torch.Tensor:
        """The plan of a step with these slots."""
        size = native_library().plan_bytes(max(1, len(slots))) // 4
        plan = torch.zeros(size, dtype=torch.int32, device=slots.device)
        ops.plan(slots, SLOTS, plan)
        return plan
