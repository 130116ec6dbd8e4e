# SPDX-License-Identifier: Apache-2.0
"""The constants and structs of `deltaweave.h`, field for field; the header is the authority on what each means."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from enum import IntEnum
from typing import ClassVar

from deltaweave.runtime_plugin.library.errors import LibraryError

__all__ = [
    "BAND_FIELDS",
    "BASE_TOKENS",
    "DIRECTORY_FIELDS",
    "DTYPES",
    "GRIDS",
    "MAX_BANDS",
    "MAX_EXPERTS",
    "MAX_SLICES",
    "MAX_TOKENS",
    "ArenaConfig",
    "ArenaStats",
    "BandField",
    "BandShape",
    "Batch",
    "Bias",
    "BiasSlice",
    "Embedding",
    "Field",
    "Gate",
    "Gemm",
    "Norm",
    "Parameter",
    "ParameterKind",
    "Record",
    "RecordKind",
    "RepackArgs",
    "Slice",
]

MAX_BANDS = 8
MAX_EXPERTS = 8
MAX_SLICES = 4
MAX_TOKENS = 2048
BASE_TOKENS = 8
GRIDS = {"none": 0, "affine": 1, "codebook": 2}
DTYPES = {"float16": 0, "bfloat16": 1}


class ParameterKind(IntEnum):
    """What a parameter of the base is: dw_parameter_kind."""

    LINEAR, EMBEDDING, VECTOR, GATE = range(4)


class RecordKind(IntEnum):
    """How a tenant changes a parameter: dw_record_kind."""

    FACTORED, DENSE, ROWS, VALUES, LORA, MIX = range(6)


class Field(IntEnum):
    """Places in a row of the directory. KIND holds a `RecordKind` plus 1; BANDS is the first band's first field."""

    BAND_COUNT = 0
    PADDED_RANK = 2
    HEADER = 3
    SIGMA = 4
    KIND = 5
    INDICES = 6
    VALUES = 7
    ROWS = 8
    V_GROUP_SIZE = 9
    V_GROUP_OFFSET = 10
    U_GROUP_SIZE = 11
    U_GROUP_OFFSET = 12
    BANDS = 16


class BandField(IntEnum):
    """Places within a band of a directory row. SHAPE is bits | grid << 8 | rank << 16."""

    SHAPE, V, U, LEVELS = range(4)


BAND_FIELDS = len(BandField)
DIRECTORY_FIELDS = Field.BANDS + MAX_BANDS * BAND_FIELDS


class Parameter(ctypes.Structure):
    """A parameter of the base, or a tensor-parallel shard whose first feature lies `offset` behind a multiple of 128.

    A vector has its length as in_features and 1 as out_features; an embedding its rows as out_features.
    """

    _fields_: ClassVar = [
        ("kind", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("in_offset", c_int32),
        ("out_offset", c_int32),
    ]


class BandShape(ctypes.Structure):
    """Bits, rank and grid (a value of `GRIDS`) of one band."""

    _fields_: ClassVar = [("bits", c_int32), ("rank", c_int32), ("grid", c_int32)]


class Record(ctypes.Structure):
    """The shape of one tenant's record of one parameter; a group size of 0 is one group."""

    _fields_: ClassVar = [
        ("parameter", c_int32),
        ("kind", c_int32),
        ("rows", c_int32),
        ("shares", c_int32),
        ("band_count", c_int32),
        ("bands", BandShape * MAX_BANDS),
        ("v_group_size", c_int32),
        ("v_group_offset", c_int32),
        ("u_group_size", c_int32),
        ("u_group_offset", c_int32),
    ]

    @classmethod
    def factored(
        cls,
        parameter: int,
        bands: Sequence[tuple[int, int, str]],
        group_sizes: tuple[int | None, int | None] = (128, 128),
        group_offsets: tuple[int, int] = (0, 0),
    ) -> Record:
        """v, u and sigma of a linear parameter.

        Args:
            parameter: index in the arena's table.
            bands: (bits, rank, grid kind as the format names it).
            group_sizes: of v and u; None for one group.
            group_offsets: of v and u, in elements.

        Raises:
            LibraryError: more than 8 bands, or a grid kind that the format does not know.
        """
        if not 1 <= len(bands) <= MAX_BANDS:
            raise LibraryError(f"{len(bands)} bands, expected 1 to {MAX_BANDS}")
        record = cls(parameter=parameter, kind=RecordKind.FACTORED, shares=-1, band_count=len(bands))
        for place, (bits, rank, grid) in enumerate(bands):
            if grid not in GRIDS:
                raise LibraryError(f"grid {grid!r}, expected one of {', '.join(GRIDS)}")
            record.bands[place] = BandShape(bits, rank, GRIDS[grid])
        record.v_group_size, record.u_group_size = (size or 0 for size in group_sizes)
        record.v_group_offset, record.u_group_offset = group_offsets
        return record

    @classmethod
    def dense(
        cls, parameter: int, rows: int, bits: int, grid: str, group_size: int | None = 128, group_offset: int = 0
    ) -> Record:
        """Low-bit rows added to the first `rows` of an embedding or lm_head; the arguments as for `factored`."""
        record = cls.factored(parameter, [(bits, rows, grid)], (group_size, None), (group_offset, 0))
        record.kind, record.rows = RecordKind.DENSE, rows
        return record

    @classmethod
    def replaced_rows(cls, parameter: int, rows: int) -> Record:
        """`rows` fp16 rows that replace those of an embedding or lm_head."""
        record = cls(parameter=parameter, kind=RecordKind.ROWS, rows=rows, shares=-1, band_count=1)
        record.bands[0] = BandShape(16, rows, GRIDS["none"])
        return record

    @classmethod
    def values(cls, parameter: int) -> Record:
        """Float32 values that replace a norm weight or bias."""
        return cls(parameter=parameter, kind=RecordKind.VALUES, shares=-1)

    @classmethod
    def lora(cls, parameter: int, ranks: Sequence[int]) -> Record:
        """The LoRAs of a fusion's experts in a linear parameter; rank 0 for one that leaves it alone.

        Raises:
            LibraryError: more than 8 experts.
        """
        _require_experts(len(ranks))
        record = cls(parameter=parameter, kind=RecordKind.LORA, shares=-1, band_count=len(ranks))
        for place, rank in enumerate(ranks):
            record.bands[place] = BandShape(16, rank, GRIDS["none"])
        return record

    @classmethod
    def mix(cls, parameter: int, experts: int, gated: bool) -> Record:
        """How a gate weighs a fusion's experts: by the token if `gated`, else with fixed weights.

        Raises:
            LibraryError: more than 8 experts.
        """
        _require_experts(experts)
        return cls(parameter=parameter, kind=RecordKind.MIX, rows=experts, shares=-1, band_count=int(gated))

    @classmethod
    def shared(cls, parameter: int, owner: int) -> Record:
        """The record of parameter `owner` of the same tenant, for a parameter that is tied to it."""
        return cls(parameter=parameter, shares=owner)


def _require_experts(count: int) -> None:
    if not 1 <= count <= MAX_EXPERTS:
        raise LibraryError(f"fusion of {count} experts, the kernels take 1 to {MAX_EXPERTS}")


class ArenaConfig(ctypes.Structure):
    _fields_: ClassVar = [
        ("device_address", c_uint64),
        ("bytes", c_uint64),
        ("slot_count", c_int32),
        ("parameter_count", c_int32),
        ("parameters", POINTER(Parameter)),
        ("max_rank", c_int32),
    ]


class ArenaStats(ctypes.Structure):
    """Bytes and slots of an arena at one moment."""

    _fields_: ClassVar = [
        ("bytes", c_uint64),
        ("free_bytes", c_uint64),
        ("largest_free_bytes", c_uint64),
        ("slot_count", c_int32),
        ("free_slots", c_int32),
        ("resident_slots", c_int32),
        ("retired_slots", c_int32),
        ("live_graphs", c_int32),
        ("open_steps", c_uint64),
    ]


class RepackArgs(ctypes.Structure):
    """Device addresses of one record's tensors in file order (None for those it lacks), and of its payload."""

    _fields_: ClassVar = [
        ("record", Record),
        ("parameter", Parameter),
        ("v_codes", c_void_p),
        ("v_grid", c_void_p),
        ("u_codes", c_void_p),
        ("u_grid", c_void_p),
        ("sigma", c_void_p),
        ("levels", c_void_p),
        ("indices", c_void_p),
        ("values", c_void_p),
        ("payload", c_void_p),
        ("payload_bytes", c_uint64),
    ]


class Slice(ctypes.Structure):
    """One of the fused linears of a call; `base` may be None in all of them."""

    _fields_: ClassVar = [
        ("parameter", c_int32),
        ("out_features", c_int32),
        ("out_offset", c_int32),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("base", c_void_p),
        ("base_stride", c_int64),
    ]


class Gemm(ctypes.Structure):
    """One call of `Library.delta_gemm`, `dense_gemm` or `gated_lora`."""

    _fields_: ClassVar = [
        ("arena", c_void_p),
        ("directory", c_void_p),
        ("parameter_count", c_int32),
        ("slot_count", c_int32),
        ("max_rank", c_int32),
        ("dtype", c_int32),
        ("token_count", c_int32),
        ("in_features", c_int32),
        ("in_offset", c_int32),
        ("chunk_tokens", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("plan", c_void_p),
        ("slice_count", c_int32),
        ("slices", Slice * MAX_SLICES),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("weights", c_void_p),
        ("weights_stride", c_int64),
    ]


class Batch(ctypes.Structure):
    """The arena and the tokens of an element-wise call; `dtype` is a value of `DTYPES`."""

    _fields_: ClassVar = [
        ("arena", c_void_p),
        ("directory", c_void_p),
        ("slots", c_void_p),
        ("parameter_count", c_int32),
        ("slot_count", c_int32),
        ("token_count", c_int32),
        ("dtype", c_int32),
        ("arena_address", c_void_p),
    ]


class Norm(ctypes.Structure):
    """One call of `Library.rms_norm`."""

    _fields_: ClassVar = [
        ("batch", Batch),
        ("parameter", c_int32),
        ("rows_per_token", c_int32),
        ("features", c_int32),
        ("epsilon", c_float),
        ("x", c_void_p),
        ("x_token_stride", c_int64),
        ("x_row_stride", c_int64),
        ("y", c_void_p),
        ("y_token_stride", c_int64),
        ("y_row_stride", c_int64),
        ("weight", c_void_p),
    ]


class BiasSlice(ctypes.Structure):
    """One of the outputs of `Library.add_bias`; `bias` may be None."""

    _fields_: ClassVar = [
        ("parameter", c_int32),
        ("features", c_int32),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("bias", c_void_p),
    ]


class Bias(ctypes.Structure):
    """One call of `Library.add_bias`."""

    _fields_: ClassVar = [("batch", Batch), ("slice_count", c_int32), ("slices", BiasSlice * MAX_SLICES)]


class Embedding(ctypes.Structure):
    """One call of `Library.embed`."""

    _fields_: ClassVar = [
        ("batch", Batch),
        ("parameter", c_int32),
        ("base_rows", c_int32),
        ("features", c_int32),
        ("in_offset", c_int32),
        ("ids", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
    ]


class Gate(ctypes.Structure):
    """One call of `Library.gate_weights`."""

    _fields_: ClassVar = [
        ("batch", Batch),
        ("parameter", c_int32),
        ("features", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("weights", c_void_p),
        ("weights_stride", c_int64),
    ]
