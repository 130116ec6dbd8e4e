# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU: libdeltaweave on the current stream, workspaces from PyTorch's allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deltaweave.runtime_plugin.library import (
    BASE_TOKENS,
    DTYPES,
    Batch,
    Bias,
    BiasSlice,
    Embedding,
    Gate,
    Gemm,
    Norm,
    Slice,
)
from deltaweave.runtime_plugin.pytorch.native import native_library

__all__ = ["Kernels", "takes_base"]

Tensor = torch.Tensor
ALIGNMENT = 16  # bytes, of rows that kernels read whole


def takes_base(x: Tensor, base: Sequence[Tensor]) -> bool:
    """Whether `delta_gemm`'s kernel computes the products of these weights itself."""
    return len(x) <= BASE_TOKENS and all(_has_aligned_rows(tensor) for tensor in (x, *base))


class Kernels:
    """One function an op; `ops` checks the arguments and says what they are."""

    @staticmethod
    def plan(slots: Tensor, slot_count: int, plan: Tensor) -> None:
        """Groups the tokens by slot."""
        if len(slots):
            native_library().plan_tokens(
                slots.data_ptr(), len(slots), slot_count, plan.data_ptr(), 4 * plan.numel(), stream=_stream(slots)
            )

    @staticmethod
    def delta_gemm(
        arena: Tensor,
        directory: Tensor,
        plan: Tensor,
        x: Tensor,
        ys: Sequence[Tensor],
        parameters: Sequence[int],
        max_rank: int,
        in_offset: int,
        out_offsets: Sequence[int],
        weights: Tensor | None,
        base: Sequence[Tensor] | None,
    ) -> None:
        """Both stages, fused over the slices; the base's products by the first, or else by cuBLAS."""
        if not len(x):
            return
        if base is not None and not takes_base(x, base):
            for y, weight in zip(ys, base, strict=True):
                torch.mm(x, weight.t(), out=y)
            base = None
        product = _Product(arena, directory, plan, x, parameters, max_rank, in_offset, out_offsets)
        gemm, workspace = product.arguments(ys)
        for place, weight in enumerate(base or ()):
            gemm.slices[place].base, gemm.slices[place].base_stride = weight.data_ptr(), weight.stride(0)
        _weigh(gemm, weights)
        native_library().delta_gemm(gemm, _stream(workspace))

    @staticmethod
    def gate(arena: Tensor, directory: Tensor, slots: Tensor, x: Tensor, parameter: int, weights: Tensor) -> None:
        """One block of threads a token."""
        if not len(slots):
            return
        arguments = Gate(
            batch=_batch(arena, directory, slots, x),
            parameter=parameter,
            features=x.shape[1],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            weights=weights.data_ptr(),
            weights_stride=weights.stride(0),
        )
        native_library().gate_weights(arguments, _stream(x))

    @staticmethod
    def gated_lora(
        arena: Tensor,
        directory: Tensor,
        plan: Tensor,
        x: Tensor,
        ys: Sequence[Tensor],
        weights: Tensor,
        parameters: Sequence[int],
        max_rank: int,
        in_offset: int,
        out_offsets: Sequence[int],
    ) -> None:
        """Both stages of all experts, fused over the slices."""
        if len(x):
            product = _Product(arena, directory, plan, x, parameters, max_rank, in_offset, out_offsets)
            gemm, workspace = product.arguments(ys)
            _weigh(gemm, weights)
            native_library().gated_lora(gemm, _stream(workspace))

    @staticmethod
    def dense_gemm(
        arena: Tensor, directory: Tensor, plan: Tensor, x: Tensor, y: Tensor, parameter: int, max_rank: int
    ) -> None:
        """Low-bit and replaced rows."""
        if len(x):
            gemm, workspace = _Product(arena, directory, plan, x, [parameter], max_rank, 0, [0]).arguments([y])
            native_library().dense_gemm(gemm, _stream(workspace))

    @staticmethod
    def rms_norm(
        arena: Tensor,
        directory: Tensor,
        slots: Tensor,
        x: Tensor,
        weight: Tensor,
        epsilon: float,
        parameter: int,
        y: Tensor,
    ) -> None:
        """X and y [tokens, rows, features]."""
        arguments = Norm(
            batch=_batch(arena, directory, slots, x),
            parameter=parameter,
            rows_per_token=x.shape[1],
            features=x.shape[2],
            epsilon=epsilon,
            x=x.data_ptr(),
            x_token_stride=x.stride(0),
            x_row_stride=x.stride(1),
            y=y.data_ptr(),
            y_token_stride=y.stride(0),
            y_row_stride=y.stride(1),
            weight=weight.data_ptr(),
        )
        native_library().rms_norm(arguments, _stream(x))

    @staticmethod
    def add_bias(
        arena: Tensor,
        directory: Tensor,
        slots: Tensor,
        ys: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        parameters: Sequence[int],
    ) -> None:
        """All slices in one launch."""
        if not len(slots):
            return
        arguments = Bias(batch=_batch(arena, directory, slots, ys[0]), slice_count=len(ys))
        for place, (y, bias, parameter) in enumerate(zip(ys, biases, parameters, strict=True)):
            address = None if bias is None else bias.data_ptr()
            arguments.slices[place] = BiasSlice(parameter, y.shape[1], y.data_ptr(), y.stride(0), address)
        native_library().add_bias(arguments, _stream(slots))

    @staticmethod
    def embed(
        arena: Tensor, directory: Tensor, slots: Tensor, ids: Tensor, table: Tensor, parameter: int, y: Tensor
    ) -> None:
        """One row a token."""
        if not len(ids):
            return
        arguments = Embedding(
            batch=_batch(arena, directory, slots, table),
            parameter=parameter,
            base_rows=table.shape[0],
            features=table.shape[1],
            ids=ids.data_ptr(),
            table=table.data_ptr(),
            table_stride=table.stride(0),
            y=y.data_ptr(),
            y_stride=y.stride(0),
        )
        native_library().embed(arguments, _stream(slots))


@dataclass(frozen=True)
class _Product:
    """A product's arguments but for y, as `ops.delta_gemm` says what they are."""

    arena: Tensor
    directory: Tensor
    plan: Tensor
    x: Tensor
    parameters: Sequence[int]
    max_rank: int
    in_offset: int
    out_offsets: Sequence[int]

    def arguments(self, ys: Sequence[Tensor]) -> tuple[Gemm, Tensor]:
        """All of them, and their workspace: free for others as soon as the stream has passed the launch."""
        gemm = Gemm(
            arena=self.arena.data_ptr(),
            directory=self.directory.data_ptr(),
            parameter_count=self.directory.shape[0],
            slot_count=self.directory.shape[1],
            max_rank=self.max_rank,
            dtype=_dtype(self.x),
            token_count=self.x.shape[0],
            in_features=self.x.shape[1],
            in_offset=self.in_offset,
            x=self.x.data_ptr(),
            x_stride=self.x.stride(0),
            plan=self.plan.data_ptr(),
            slice_count=len(ys),
        )
        for place, (y, parameter, offset) in enumerate(zip(ys, self.parameters, self.out_offsets, strict=True)):
            gemm.slices[place] = Slice(parameter, y.shape[1], offset, y.data_ptr(), y.stride(0))
        workspace = torch.empty(native_library().workspace_bytes(gemm), dtype=torch.uint8, device=self.x.device)
        gemm.workspace, gemm.workspace_bytes = workspace.data_ptr(), workspace.numel()
        return gemm, workspace


def _has_aligned_rows(tensor: Tensor) -> bool:
    stride, row = (count * tensor.element_size() for count in (tensor.stride(0), tensor.shape[1]))
    return all(value % ALIGNMENT == 0 for value in (tensor.data_ptr(), stride, row))


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def _dtype(tensor: Tensor) -> int:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _batch(arena: Tensor, directory: Tensor, slots: Tensor, activation: Tensor) -> Batch:
    return Batch(
        arena=arena.data_ptr(),
        directory=directory.data_ptr(),
        slots=slots.data_ptr(),
        parameter_count=directory.shape[0],
        slot_count=directory.shape[1],
        token_count=len(slots),
        dtype=_dtype(activation),
    )


def _weigh(gemm: Gemm, weights: Tensor | None) -> None:
    if weights is not None:
        gemm.weights, gemm.weights_stride = weights.data_ptr(), weights.stride(0)
