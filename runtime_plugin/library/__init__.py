# SPDX-License-Identifier: Apache-2.0
"""libdeltaweave through ctypes. No torch here.

Device memory is passed as integer addresses; the caller keeps it alive and owns the stream. `deltaweave.h` is the
authority on what each argument means.
"""

from deltaweave.runtime_plugin.library.arena import Arena, Payload
from deltaweave.runtime_plugin.library.binding import ABI_VERSION, Library, find_library
from deltaweave.runtime_plugin.library.errors import ArenaFullError, LibraryError
from deltaweave.runtime_plugin.library.structs import (
    BAND_FIELDS,
    BASE_TOKENS,
    DIRECTORY_FIELDS,
    DTYPES,
    GRIDS,
    MAX_BANDS,
    MAX_EXPERTS,
    MAX_SLICES,
    MAX_TOKENS,
    ArenaStats,
    BandField,
    BandShape,
    Batch,
    Bias,
    BiasSlice,
    Embedding,
    Field,
    Gate,
    Gemm,
    Norm,
    Parameter,
    ParameterKind,
    Record,
    RecordKind,
    RepackArgs,
    Slice,
)

__all__ = [
    "ABI_VERSION",
    "BAND_FIELDS",
    "BASE_TOKENS",
    "DIRECTORY_FIELDS",
    "DTYPES",
    "GRIDS",
    "MAX_BANDS",
    "MAX_EXPERTS",
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
    "Gate",
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
