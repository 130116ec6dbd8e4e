# SPDX-License-Identifier: Apache-2.0
"""An arena on the GPU held by torch tensors, for tests and benchmarks of the kernels below any host."""

from __future__ import annotations

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

__all__ = ["AnyRecord", "DeviceArena", "Step", "to_device"]


def to_device(data: bytes) -> torch.Tensor:
    """Bytes as a device tensor; one byte for nothing."""
    return torch.from_numpy(np.frombuffer(data or b"\0", dtype=np.uint8).copy()).cuda()


class AnyRecord(Protocol):
    """What the random records of factored_records and table_records have in common."""

    def shape(self, parameter: int) -> Record: ...

    def tensors(self) -> dict[str, bytes]: ...


class DeviceArena:
    """The buffer, the directory and the bookkeeping."""

    def __init__(
        self, library: Library, parameters: Sequence[Parameter], *, slots: int, size: int, max_rank: int
    ) -> None:
        self.library = library
        self.max_rank = max_rank
        self.buffer = torch.full((size,), 0xA5, dtype=torch.uint8, device="cuda")
        self.address = torch.tensor([self.buffer.data_ptr()], device="cuda")
        self.directory = torch.zeros((len(parameters), slots, DIRECTORY_FIELDS), dtype=torch.int64, device="cuda")
        self.arena = Arena(
            library,
            device_address=self.buffer.data_ptr(),
            size=size,
            slots=slots,
            parameters=parameters,
            max_rank=max_rank,
        )

    def add(self, records: Mapping[int, AnyRecord]) -> int:
        """Uploads, repacks and commits a tenant; returns its slot."""
        shapes = {index: record.shape(index) for index, record in records.items()}
        slot = self.arena.reserve(list(shapes.values()))
        for index, record in records.items():
            if shapes[index].shares == -1:
                tensors = {name: to_device(data) for name, data in record.tensors().items()}
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
        self.library.repack(arguments, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()  # the tensors may go

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
        self.directory[:, slot] = torch.tensor(self.arena.directory_rows(slot)).cuda()

    def evict(self, slot: int) -> None:
        """Zeroes the directory rows and frees the slot."""
        self.directory[:, slot] = 0
        torch.cuda.synchronize()
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
        self.slots = slots.to(device="cuda", dtype=torch.int32)
        self.chunk = chunk
        size = arena.library.plan_bytes(len(slots))
        self.plan = torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda")

    def make_plan(self) -> None:
        """Groups the tokens."""
        self.arena.library.plan_tokens(
            self.slots.data_ptr(),
            len(self.slots),
            self.arena.directory.shape[1],
            self.plan.data_ptr(),
            self.plan.numel(),
            chunk=self.chunk,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def product(self, x: torch.Tensor, outputs: Sequence[tuple[int, torch.Tensor]]) -> tuple[Gemm, torch.Tensor]:
        """The arguments of y += delta(x) for (parameter, y) pairs, and their workspace, to be kept alive."""
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
        workspace = torch.full((arena.library.workspace_bytes(gemm),), 0xFF, dtype=torch.uint8, device="cuda")
        gemm.workspace = workspace.data_ptr()
        gemm.workspace_bytes = workspace.numel()
        return gemm, workspace

    def run(self, x: torch.Tensor, outputs: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Plans and multiplies on the current stream."""
        self.make_plan()
        gemm, workspace = self.product(x, outputs)
        self.arena.library.delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)
        workspace.record_stream(torch.cuda.current_stream())
