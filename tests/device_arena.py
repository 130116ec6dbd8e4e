# SPDX-License-Identifier: Apache-2.0
"""An arena held by torch tensors, for tests and benchmarks of the kernels below any host.

The device is a GPU, or the CPU for a library whose kernels are emulated there (emulated_library).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from deltaweave.runtime_plugin.library import (
    DIRECTORY_FIELDS,
    DTYPES,
    Arena,
    Batch,
    Gemm,
    Library,
    Parameter,
    Record,
    RepackArgs,
    Slice,
)

__all__ = ["AnyRecord", "DeviceArena", "Step", "placed", "poisoned", "to_device"]


def poisoned(size: int, value: int, device: str) -> torch.Tensor:
    """Bytes of one value. Those of the CPU end, up to alignment, at a page that nobody may touch."""
    if device == "cuda":
        return torch.full((size,), value, dtype=torch.uint8, device=device)
    aligned = -(-size // 256) * 256
    whole = -(-aligned // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    guard = ctypes.c_void_p(everything.data_ptr() + whole)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return everything[whole - aligned :][:size].fill_(value)


def placed(values: torch.Tensor, device: str) -> torch.Tensor:
    """A copy on the device."""
    if device == "cuda":
        return values.cuda()
    memory = poisoned(values.numel() * values.element_size(), 0, device)
    return memory.view(values.dtype).view(values.shape).copy_(values)


def to_device(data: bytes, device: str = "cuda") -> torch.Tensor:
    """Bytes as a device tensor; one byte for nothing."""
    return placed(torch.from_numpy(np.frombuffer(data or b"\0", dtype=np.uint8).copy()), device)


class AnyRecord(Protocol):
    """What the random records of factored_records and table_records have in common."""

    def shape(self, parameter: int) -> Record: ...

    def tensors(self) -> dict[str, bytes]: ...


class DeviceArena:
    """The buffer, the directory and the bookkeeping."""

    def __init__(
        self,
        library: Library,
        parameters: Sequence[Parameter],
        *,
        slots: int,
        size: int,
        max_rank: int,
        device: str = "cuda",
    ) -> None:
        self.library = library
        self.max_rank = max_rank
        self.device = device
        self.buffer = poisoned(size, 0xA5, device)
        self.address = torch.tensor([self.buffer.data_ptr()], device=device)
        shape = (len(parameters), slots, DIRECTORY_FIELDS)
        self.directory = placed(torch.zeros(shape, dtype=torch.int64), device)
        self.arena = Arena(
            library,
            device_address=self.buffer.data_ptr(),
            size=size,
            slots=slots,
            parameters=parameters,
            max_rank=max_rank,
        )

    @property
    def stream(self) -> int:
        """The current stream as the library takes it."""
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def synchronize(self) -> None:
        """Waits until what was launched has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def add(self, records: Mapping[int, AnyRecord]) -> int:
        """Uploads, repacks and commits a tenant; returns its slot."""
        shapes = {index: record.shape(index) for index, record in records.items()}
        slot = self.arena.reserve(list(shapes.values()))
        for index, record in records.items():
            if shapes[index].shares == -1:
                tensors = {name: to_device(data, self.device) for name, data in record.tensors().items()}
                self.repack_tensors(slot, index, shapes[index], tensors)
        self.publish(slot)
        return slot

    def repack(self, slot: int, index: int, shape: Record, parts: Sequence[torch.Tensor]) -> None:
        """A factored record's tensors (v codes, v grid, u codes, u grid, sigma, levels) into a reserved slot."""
        names = ("v_codes", "v_grid", "u_codes", "u_grid", "sigma", "levels")
        self.repack_tensors(slot, index, shape, dict(zip(names, parts, strict=True)))

    def repack_tensors(self, slot: int, index: int, shape: Record, tensors: Mapping[str, torch.Tensor]) -> None:
        """File-order tensors, by the name of their field in RepackArgs, into a reserved slot."""
        arguments = self.repack_arguments(slot, index, shape, tensors)
        self.library.repack(arguments, self.stream)
        self.synchronize()  # the tensors may go

    def repack_arguments(self, slot: int, index: int, shape: Record, tensors: Mapping[str, torch.Tensor]) -> RepackArgs:
        """The call that repacks tensors, which the caller keeps alive."""
        place = self.arena.payload(slot, index)
        arguments = RepackArgs(record=shape, parameter=self.arena.parameters[index])
        for name, tensor in tensors.items():
            setattr(arguments, name, tensor.data_ptr())
        arguments.payload = self.buffer.data_ptr() + place.offset
        arguments.payload_bytes = place.bytes
        return arguments

    def publish(self, slot: int) -> None:
        """Commits a slot and copies its directory rows."""
        self.arena.commit(slot)
        self.directory[:, slot] = torch.tensor(self.arena.directory_rows(slot), device=self.device)

    def evict(self, slot: int) -> None:
        """Zeroes the directory rows and frees the slot."""
        self.directory[:, slot] = 0
        self.synchronize()
        self.arena.evict(slot)

    def batch(self, slots: torch.Tensor, dtype: torch.dtype, *, by_address: bool = False) -> Batch:
        """What the element-wise kernels share; `slots` is int32 on the device, kept alive by the caller.

        `by_address` tells the kernels where the arena's address lies, instead of the address.
        """
        return Batch(
            arena=None if by_address else self.buffer.data_ptr(),
            arena_address=self.address.data_ptr() if by_address else None,
            directory=self.directory.data_ptr(),
            slots=slots.data_ptr(),
            parameter_count=self.directory.shape[0],
            slot_count=self.directory.shape[1],
            token_count=len(slots),
            dtype=DTYPES[str(dtype).removeprefix("torch.")],
        )


class Step:
    """A step's plan over an arena, and products under it."""

    def __init__(self, arena: DeviceArena, slots: torch.Tensor, *, chunk: int = 0) -> None:
        self.arena = arena
        self.slots = placed(slots.to(dtype=torch.int32), arena.device)
        self.chunk = chunk
        size = arena.library.plan_bytes(len(slots))
        self.plan = poisoned(size, 0x5A, arena.device)

    def make_plan(self) -> None:
        """Groups the tokens."""
        self.arena.library.plan_tokens(
            self.slots.data_ptr(),
            len(self.slots),
            self.arena.directory.shape[1],
            self.plan.data_ptr(),
            self.plan.numel(),
            chunk=self.chunk,
            stream=self.arena.stream,
        )

    def product(
        self, x: torch.Tensor, outputs: Sequence[tuple[int, torch.Tensor]], base: Sequence[torch.Tensor] = ()
    ) -> tuple[Gemm, torch.Tensor]:
        """The arguments of y += delta(x) for (parameter, y) pairs, and their workspace, to be kept alive.

        With the base's weights, of y = base(x) + delta(x).
        """
        arena = self.arena
        shape = arena.arena.parameters[outputs[0][0]]
        gemm = Gemm(
            arena=arena.buffer.data_ptr(),
            directory=arena.directory.data_ptr(),
            parameter_count=arena.directory.shape[0],
            slot_count=arena.directory.shape[1],
            max_rank=arena.max_rank,
            dtype=DTYPES[str(x.dtype).removeprefix("torch.")],
            token_count=len(x),
            in_features=x.shape[1],
            in_offset=shape.in_offset,
            chunk_tokens=self.chunk,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            plan=self.plan.data_ptr(),
            slice_count=len(outputs),
        )
        for place, (index, y) in enumerate(outputs):
            out_offset = arena.arena.parameters[index].out_offset
            gemm.slices[place] = Slice(index, y.shape[1], out_offset, y.data_ptr(), y.stride(0))
        for place, weight in enumerate(base):
            gemm.slices[place].base, gemm.slices[place].base_stride = weight.data_ptr(), weight.stride(0)
        workspace = poisoned(arena.library.workspace_bytes(gemm), 0xFF, arena.device)
        gemm.workspace = workspace.data_ptr()
        gemm.workspace_bytes = workspace.numel()
        return gemm, workspace

    def run(self, x: torch.Tensor, outputs: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Plans and multiplies on the current stream."""
        self.make_plan()
        gemm, workspace = self.product(x, outputs)
        self.arena.library.delta_gemm(gemm, self.arena.stream)
        if workspace.is_cuda:
            workspace.record_stream(torch.cuda.current_stream())
