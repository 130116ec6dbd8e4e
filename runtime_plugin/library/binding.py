# SPDX-License-Identifier: Apache-2.0
"""The shared object: finding and loading it, one method per function, status codes as exceptions."""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from deltaweave.runtime_plugin.library.errors import ArenaFullError, LibraryError
from deltaweave.runtime_plugin.library.structs import (
    ArenaConfig,
    ArenaStats,
    Bias,
    Embedding,
    Gate,
    Gemm,
    Norm,
    Record,
    RepackArgs,
)

__all__ = ["ABI_VERSION", "Library", "find_library"]

ABI_VERSION = 8
FULL = 3  # DW_ERROR_FULL
ENVIRONMENT = "DELTAWEAVE_LIBRARY"
FILE_NAME = "libdeltaweave.so"
PACKAGE = "deltaweave.runtime_plugin"

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
    "dw_delta_shrink": [POINTER(Gemm), c_void_p],
    "dw_delta_expand": [POINTER(Gemm), c_void_p],
    "dw_dense_gemm": [POINTER(Gemm), c_void_p],
    "dw_gated_lora": [POINTER(Gemm), c_void_p],
    "dw_rms_norm": [POINTER(Norm), c_void_p],
    "dw_add_bias": [POINTER(Bias), c_void_p],
    "dw_embed": [POINTER(Embedding), c_void_p],
    "dw_gate_weights": [POINTER(Gate), c_void_p],
}


def find_library() -> Path | None:
    """The library of DELTAWEAVE_LIBRARY, else the one installed with this package, else None."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    # An editable install has the modules in one folder and the library in another.
    folders = sys.modules[PACKAGE].__path__
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
        """Adds the factored delta terms to y, for tokens whose tenant has one; with `base`, to the base's product."""
        self.call("dw_delta_gemm", byref(gemm), stream)

    def delta_shrink(self, gemm: Gemm, stream: int = 0) -> None:
        """The first half of `delta_gemm`, for few tokens: without `base` it needs no y. The workspace must be kept."""
        self.call("dw_delta_shrink", byref(gemm), stream)

    def delta_expand(self, gemm: Gemm, stream: int = 0) -> None:
        """The second half: adds to y."""
        self.call("dw_delta_expand", byref(gemm), stream)

    def dense_gemm(self, gemm: Gemm, stream: int = 0) -> None:
        """Adds dense rows' products to y, or puts replaced rows' there, for tokens whose tenant has such a record."""
        self.call("dw_dense_gemm", byref(gemm), stream)

    def gated_lora(self, gemm: Gemm, stream: int = 0) -> None:
        """Adds a fusion's weighed LoRAs to y, for tokens whose tenant has them."""
        self.call("dw_gated_lora", byref(gemm), stream)

    def rms_norm(self, norm: Norm, stream: int = 0) -> None:
        """RMSNorm with every token's own weight."""
        self.call("dw_rms_norm", byref(norm), stream)

    def add_bias(self, bias: Bias, stream: int = 0) -> None:
        """Adds every token's own bias to up to four outputs."""
        self.call("dw_add_bias", byref(bias), stream)

    def embed(self, embedding: Embedding, stream: int = 0) -> None:
        """Looks every token's id up in its tenant's table."""
        self.call("dw_embed", byref(embedding), stream)

    def gate_weights(self, gate: Gate, stream: int = 0) -> None:
        """What every token gives each expert of its fusion."""
        self.call("dw_gate_weights", byref(gate), stream)
