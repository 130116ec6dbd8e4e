# SPDX-License-Identifier: Apache-2.0
"""libdeltaweave through ctypes: its structs, one method per function, status codes as exceptions. No torch here.

Device memory is passed as integer addresses; the caller keeps it alive and owns the stream. `deltaweave.h` is the
authority on what each argument means.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

from deltaweave.formats.errors import DeltaweaveError

__all__ = [
    "ABI_VERSION",
    "BAND_FIELDS",
    "DIRECTORY_FIELDS",
    "DTYPES",
    "GRIDS",
    "MAX_BANDS",
    "MAX_SLICES",
    "MAX_TOKENS",
    "Arena",
    "ArenaFullError",
    "ArenaStats",
    "BandField",
    "BandShape",
    "Batch",
    "Bias",
    "BiasSlice",
    "Embedding",
    "Field",
    "Gemm",
    "Library",
    "LibraryError",
    "Norm",
    "Parameter",
    "ParameterKind",
    "Payload",
    "Record",
    "RecordKind",
    "RepackArgs",
    "Slice",
    "find_library",
]

ABI_VERSION = 2
MAX_BANDS = 8
MAX_SLICES = 4
MAX_TOKENS = 2048
FULL = 3
GRIDS = {"none": 0, "affine": 1, "codebook": 2}
DTYPES = {"float16": 0, "bfloat16": 1}
ENVIRONMENT = "DELTAWEAVE_LIBRARY"
FILE_NAME = "libdeltaweave.so"


class ParameterKind(IntEnum):
    """What a parameter of the base is: dw_parameter_kind."""

    LINEAR, EMBEDDING, VECTOR = range(3)


class RecordKind(IntEnum):
    """How a tenant changes a parameter: dw_record_kind."""

    FACTORED, DENSE, ROWS, VALUES = range(4)


class Field(IntEnum):
    """Places in a row of the directory. KIND holds a `RecordKind` plus 1; BANDS is the first band's first field."""

    BAND_COUNT = 0
    ROW_BLOCKS = 1
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


class LibraryError(DeltaweaveError, RuntimeError):
    """The library is missing or refused a call; its message says what came and what was expected."""


class ArenaFullError(LibraryError):
    """No slot, or not enough free bytes, for another tenant."""


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
    def shared(cls, parameter: int, owner: int) -> Record:
        """The record of parameter `owner` of the same tenant, for a parameter that is tied to it."""
        return cls(parameter=parameter, shares=owner)


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
    """One of the fused linears of a call."""

    _fields_: ClassVar = [
        ("parameter", c_int32),
        ("out_features", c_int32),
        ("out_offset", c_int32),
        ("y", c_void_p),
        ("y_stride", c_int64),
    ]


class Gemm(ctypes.Structure):
    """One call of `Library.delta_gemm` or `dense_gemm`."""

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


SIGNATURES: dict[str, list[Any]] = {
    "dw_arena_create": [POINTER(ArenaConfig), POINTER(c_void_p)],
    "dw_arena_get_stats": [c_void_p, POINTER(ArenaStats)],
    "dw_arena_tenant_bytes": [c_void_p, POINTER(Record), c_int32, POINTER(c_uint64)],
    "dw_arena_reserve": [c_void_p, POINTER(Record), c_int32, POINTER(c_int32)],
    "dw_arena_payload": [c_void_p, c_int32, c_int32, POINTER(c_uint64), POINTER(c_uint64)],
    "dw_arena_commit": [c_void_p, c_int32],
    "dw_arena_evict": [c_void_p, c_int32],
    "dw_arena_slot_state": [c_void_p, c_int32, POINTER(c_int32)],
    "dw_arena_least_recent": [c_void_p, POINTER(c_int32)],
    "dw_arena_pin": [c_void_p, c_int32],
    "dw_arena_unpin": [c_void_p, c_int32],
    "dw_arena_directory_rows": [c_void_p, c_int32, POINTER(c_int64)],
    "dw_arena_begin_step": [c_void_p, POINTER(c_int32), c_int32, POINTER(c_uint64)],
    "dw_arena_end_step": [c_void_p, c_uint64],
    "dw_arena_acquire_graph": [c_void_p],
    "dw_arena_release_graph": [c_void_p],
    "dw_arena_grow": [c_void_p, c_uint64, c_uint64],
    "dw_repack": [POINTER(RepackArgs), c_void_p],
    "dw_plan_bytes": [c_int32, POINTER(c_size_t)],
    "dw_plan_tokens": [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_size_t, c_void_p],
    "dw_gemm_workspace_bytes": [POINTER(Gemm), POINTER(c_size_t)],
    "dw_delta_gemm": [POINTER(Gemm), c_void_p],
    "dw_dense_gemm": [POINTER(Gemm), c_void_p],
    "dw_rms_norm": [POINTER(Norm), c_void_p],
    "dw_add_bias": [POINTER(Bias), c_void_p],
    "dw_embed": [POINTER(Embedding), c_void_p],
}


def find_library() -> Path | None:
    """The library of DELTAWEAVE_LIBRARY, else the one installed with this package, else None."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    # An editable install has the modules in one folder and the library in another.
    folders = sys.modules[__package__].__path__ if __package__ else []
    return next((file for folder in folders if (file := Path(folder) / FILE_NAME).exists()), None)


class Library:
    """A loaded libdeltaweave."""

    def __init__(self, path: Path | None = None) -> None:
        """Loads it.

        Args:
            path: of the shared object; None for `find_library()`.

        Raises:
            LibraryError: none found, it does not load, or its ABI is another version.
        """
        chosen = path or find_library()
        if chosen is None:
            raise LibraryError(f"{FILE_NAME} was not built; build it with CUDA, or set {ENVIRONMENT} to its path")
        try:
            self._handle = ctypes.CDLL(str(chosen))
        except OSError as error:
            raise LibraryError(f"{chosen} does not load: {error}") from error
        self._handle.dw_last_error.restype = c_char_p
        version = self._handle.dw_abi_version()
        if version != ABI_VERSION:
            raise LibraryError(f"{chosen} has ABI version {version}, expected {ABI_VERSION}")
        for name, arguments in SIGNATURES.items():
            getattr(self._handle, name).argtypes = arguments
        self._handle.dw_arena_destroy.argtypes = [c_void_p]
        self._handle.dw_arena_destroy.restype = None

    @property
    def has_cuda(self) -> bool:
        """Whether it was built with kernels."""
        return bool(self._handle.dw_has_cuda())

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function that returns a status.

        Raises:
            ArenaFullError: DW_ERROR_FULL.
            LibraryError: any other failure, with the library's message.
        """
        status = getattr(self._handle, name)(*arguments)
        if status:
            message = self._handle.dw_last_error().decode()
            raise (ArenaFullError if status == FULL else LibraryError)(message)

    def destroy_arena(self, arena: c_void_p) -> None:
        """Frees an arena's bookkeeping."""
        self._handle.dw_arena_destroy(arena)

    def repack(self, arguments: RepackArgs, stream: int = 0) -> None:
        """Copies a record from file order to kernel order on the GPU."""
        self.call("dw_repack", byref(arguments), stream)

    def plan_bytes(self, tokens: int) -> int:
        """Bytes of the plan of a step of `tokens` tokens."""
        size = c_size_t()
        self.call("dw_plan_bytes", tokens, byref(size))
        return size.value

    def plan_tokens(
        self, slots: int, tokens: int, slot_count: int, plan: int, plan_bytes: int, *, chunk: int = 0, stream: int = 0
    ) -> None:
        """Groups a step's tokens by slot on the GPU; `slots` (int32 [tokens]) and `plan` are device addresses."""
        self.call("dw_plan_tokens", slots, tokens, slot_count, chunk, plan, plan_bytes, stream)

    def workspace_bytes(self, gemm: Gemm) -> int:
        """Bytes that `delta_gemm` and `dense_gemm` need for these sizes."""
        size = c_size_t()
        self.call("dw_gemm_workspace_bytes", byref(gemm), byref(size))
        return size.value

    def delta_gemm(self, gemm: Gemm, stream: int = 0) -> None:
        """Adds the factored delta terms to y, for tokens whose tenant has one."""
        self.call("dw_delta_gemm", byref(gemm), stream)

    def dense_gemm(self, gemm: Gemm, stream: int = 0) -> None:
        """Adds dense rows' products to y, or puts replaced rows' there, for tokens whose tenant has such a record."""
        self.call("dw_dense_gemm", byref(gemm), stream)

    def rms_norm(self, norm: Norm, stream: int = 0) -> None:
        """RMSNorm with every token's own weight."""
        self.call("dw_rms_norm", byref(norm), stream)

    def add_bias(self, bias: Bias, stream: int = 0) -> None:
        """Adds every token's own bias to up to four outputs."""
        self.call("dw_add_bias", byref(bias), stream)

    def embed(self, embedding: Embedding, stream: int = 0) -> None:
        """Looks every token's id up in its tenant's table."""
        self.call("dw_embed", byref(embedding), stream)


@dataclass(frozen=True)
class Payload:
    """Where a record lies in the arena: byte offset and length."""

    offset: int
    bytes: int


class Arena:
    """Slots, bytes and directory rows of one device buffer; the states are deltaweave.h's `dw_slot_state`."""

    FREE, LOADING, RESIDENT, RETIRED = range(4)

    def __init__(
        self,
        library: Library,
        *,
        device_address: int,
        size: int,
        slots: int,
        parameters: Sequence[Parameter],
        max_rank: int,
    ) -> None:
        """Begins with every slot free.

        Args:
            library: the loaded library.
            device_address: of the buffer, a multiple of 256.
            size: its bytes.
            slots: tenants that may be resident at a time, bytes allowing.
            parameters: those of the model that tenants may change, in the directory's order.
            max_rank: largest rank of any factored record.

        Raises:
            LibraryError: a value outside its contract.
        """
        self.library = library
        self.slots = slots
        self.parameters = list(parameters)
        table = (Parameter * len(self.parameters))(*self.parameters)
        config = ArenaConfig(device_address, size, slots, len(self.parameters), table, max_rank)
        self._handle = c_void_p()
        library.call("dw_arena_create", byref(config), byref(self._handle))

    def close(self) -> None:
        """Frees the bookkeeping; the buffer is the caller's."""
        if self._handle:
            self.library.destroy_arena(self._handle)
            self._handle = c_void_p()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> ArenaStats:
        """Free and used bytes and slots."""
        stats = ArenaStats()
        self._call("dw_arena_get_stats", byref(stats))
        return stats

    def tenant_bytes(self, records: Sequence[Record]) -> int:
        """Bytes that these records would take."""
        size = c_uint64()
        self._call("dw_arena_tenant_bytes", _array(records), len(records), byref(size))
        return size.value

    def reserve(self, records: Sequence[Record]) -> int:
        """Takes a slot and bytes for a tenant, which is then LOADING.

        Raises:
            ArenaFullError: no slot or no bytes; nothing was taken.
        """
        slot = c_int32()
        self._call("dw_arena_reserve", _array(records), len(records), byref(slot))
        return slot.value

    def payload(self, slot: int, parameter: int) -> Payload:
        """Where a reserved record lies."""
        offset, size = c_uint64(), c_uint64()
        self._call("dw_arena_payload", slot, parameter, byref(offset), byref(size))
        return Payload(offset.value, size.value)

    def commit(self, slot: int) -> None:
        """LOADING to RESIDENT."""
        self._call("dw_arena_commit", slot)

    def evict(self, slot: int) -> None:
        """To RETIRED, and to FREE as soon as no open step uses the slot."""
        self._call("dw_arena_evict", slot)

    def state(self, slot: int) -> int:
        """FREE, LOADING, RESIDENT or RETIRED."""
        state = c_int32()
        self._call("dw_arena_slot_state", slot, byref(state))
        return state.value

    def least_recent(self) -> int:
        """The slot to evict first."""
        slot = c_int32()
        self._call("dw_arena_least_recent", byref(slot))
        return slot.value

    def pin(self, slot: int) -> None:
        """Keeps a resident slot from eviction, until unpinned as often."""
        self._call("dw_arena_pin", slot)

    def unpin(self, slot: int) -> None:
        """Undoes one `pin`."""
        self._call("dw_arena_unpin", slot)

    def directory_rows(self, slot: int) -> list[list[int]]:
        """A slot's directory rows, [parameters][DIRECTORY_FIELDS]; zeros unless it is RESIDENT."""
        rows = (c_int64 * (len(self.parameters) * DIRECTORY_FIELDS))()
        self._call("dw_arena_directory_rows", slot, rows)
        return [list(rows[at : at + DIRECTORY_FIELDS]) for at in range(0, len(rows), DIRECTORY_FIELDS)]

    def begin_step(self, slots: Iterable[int]) -> int:
        """A step that uses `slots` begins; returns its number for `end_step`."""
        used = list(slots)
        step = c_uint64()
        self._call("dw_arena_begin_step", (c_int32 * len(used))(*used), len(used), byref(step))
        return step.value

    def end_step(self, step: int) -> None:
        """The device has finished a step."""
        self._call("dw_arena_end_step", step)

    def acquire_graph(self) -> None:
        """A captured graph now holds the buffer's address."""
        self._call("dw_arena_acquire_graph")

    def release_graph(self) -> None:
        """A captured graph is gone."""
        self._call("dw_arena_release_graph")

    def grow(self, device_address: int, size: int) -> None:
        """The caller replaced the buffer by a larger one of the same content."""
        self._call("dw_arena_grow", device_address, size)

    def _call(self, name: str, *arguments: Any) -> None:
        if not self._handle:
            raise LibraryError("the arena is closed")
        self.library.call(name, self._handle, *arguments)


def _array(records: Sequence[Record]) -> ctypes.Array[Record]:
    return (Record * len(records))(*records)
