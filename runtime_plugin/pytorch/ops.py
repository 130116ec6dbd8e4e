# SPDX-License-Identifier: Apache-2.0
"""The ops `torch.ops.deltaweave.*`: schemas, checks and fake kernels; what a step over many tenants is made of.

    plan        (slots, slot_count, plan!)                        groups a step's tokens by slot
    delta_gemm  (arena, directory, plan, x, ys!, parameters, ...) y_s += U^T (sigma * (V x)), fused over slices s, times
                                                                  a weight a token; with `base`, the weights of the
                                                                  base: y_s = base_s x + that
    gate        (arena, directory, slots, x, parameter, weights!) what a token gives the experts of its fusion
    gated_lora  (arena, directory, plan, x, ys!, weights, ...)    y_s += sum_e w_e B_e A_e x, fused over slices s
    dense_gemm  (arena, directory, plan, x, y!, parameter, ...)   lm_head's low-bit or replaced rows
    rms_norm    (arena, directory, slots, x, weight, ...)         with the norm weight of each token's slot
    add_bias    (arena, directory, slots, ys!, biases, ...)       the bias of each token's slot
    embed       (arena, directory, slots, ids, table, parameter)  rows of each token's slot

`arena` (uint8) and `directory` (int64 [parameters, slots, fields]) are an `Arena`'s tensors, `slots` is int32 [tokens]
with -1 for the bare base, `plan` int32 is filled by `plan` and means something to the ops of the same device alone. A
call takes at most 2048 tokens and 4 slices. On the CPU the ops are the reference, in float32 whatever the dtype; on a
GPU they are libdeltaweave's kernels, for float16 and bfloat16, on the current stream and safe in CUDA graphs. For
inference: they have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.library import DIRECTORY_FIELDS, MAX_EXPERTS, MAX_SLICES, MAX_TOKENS
from deltaweave.runtime_plugin.pytorch import ops_cpu, ops_cuda

__all__ = [
    "OpError",
    "add_bias",
    "delta_gemm",
    "dense_gemm",
    "embed",
    "gate",
    "gated_lora",
    "plan",
    "rms_norm",
    "takes_base",
]

SCHEMAS = {
    "plan": "(Tensor slots, int slot_count, Tensor(a!) plan) -> ()",
    "delta_gemm": "(Tensor arena, Tensor directory, Tensor plan, Tensor x, Tensor(a!)[] ys, int[] parameters, "
    "int max_rank, int in_offset=0, int[]? out_offsets=None, Tensor? weights=None, Tensor[]? base=None) -> ()",
    "gate": "(Tensor arena, Tensor directory, Tensor slots, Tensor x, int parameter, Tensor(a!) weights) -> ()",
    "gated_lora": "(Tensor arena, Tensor directory, Tensor plan, Tensor x, Tensor(a!)[] ys, Tensor weights, "
    "int[] parameters, int max_rank, int in_offset=0, int[]? out_offsets=None) -> ()",
    "dense_gemm": "(Tensor arena, Tensor directory, Tensor plan, Tensor x, Tensor(a!) y, int parameter, "
    "int max_rank) -> ()",
    "rms_norm": "(Tensor arena, Tensor directory, Tensor slots, Tensor x, Tensor weight, float epsilon, "
    "int parameter) -> Tensor",
    "add_bias": "(Tensor arena, Tensor directory, Tensor slots, Tensor(a!)[] ys, Tensor?[] biases, "
    "int[] parameters) -> ()",
    "embed": "(Tensor arena, Tensor directory, Tensor slots, Tensor ids, Tensor table, int parameter) -> Tensor",
}
GPU_DTYPES = (torch.float16, torch.bfloat16)


class OpError(DeltaweaveError, ValueError):
    """Tensors that an op does not take; the message says what came and what was expected."""


def takes_base(x: torch.Tensor, base: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel of `delta_gemm` computes the base's products of x itself: on a GPU, for few aligned tokens.

    Otherwise the op has torch compute them, a product a slice; who has these weights as one may rather do that.
    """
    return x.is_cuda and ops_cuda.takes_base(x, base)


def _plan(slots: torch.Tensor, slot_count: int, plan: torch.Tensor) -> None:
    _require_slots(slots, slots.device)
    _require("plan", plan, torch.int32, 1, slots.device)
    _backend(slots).plan(slots, slot_count, plan)


def _delta_gemm(
    arena: torch.Tensor,
    directory: torch.Tensor,
    plan: torch.Tensor,
    x: torch.Tensor,
    ys: Sequence[torch.Tensor],
    parameters: Sequence[int],
    max_rank: int,
    in_offset: int = 0,
    out_offsets: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    base: Sequence[torch.Tensor] | None = None,
) -> None:
    _require_arena(arena, directory, parameters)
    _require("plan", plan, torch.int32, 1, arena.device)
    _require_tokens("x", x, arena.device)
    _require_slices(ys, parameters, x)
    offsets = [0] * len(ys) if out_offsets is None else out_offsets
    if weights is not None:
        _require_weights(weights, (len(x),), x.device)
    if base is not None:
        _require_base(base, ys, x)
    product = (arena, directory, plan, x, ys, parameters, max_rank, in_offset, offsets)
    _backend(arena).delta_gemm(*product, weights, base)


def _gate(
    arena: torch.Tensor,
    directory: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    parameter: int,
    weights: torch.Tensor,
) -> None:
    _require_arena(arena, directory, [parameter])
    _require_slots(slots, arena.device)
    _require_tokens("x", x, arena.device)
    if len(x) != len(slots):
        raise OpError(f"x of shape {list(x.shape)} for {len(slots)} tokens")
    _require_expert_weights(weights, x)
    _backend(arena).gate(arena, directory, slots, x, parameter, weights)


def _gated_lora(
    arena: torch.Tensor,
    directory: torch.Tensor,
    plan: torch.Tensor,
    x: torch.Tensor,
    ys: Sequence[torch.Tensor],
    weights: torch.Tensor,
    parameters: Sequence[int],
    max_rank: int,
    in_offset: int = 0,
    out_offsets: Sequence[int] | None = None,
) -> None:
    _require_arena(arena, directory, parameters)
    _require("plan", plan, torch.int32, 1, arena.device)
    _require_tokens("x", x, arena.device)
    _require_slices(ys, parameters, x)
    _require_expert_weights(weights, x)
    offsets = [0] * len(ys) if out_offsets is None else out_offsets
    _backend(arena).gated_lora(arena, directory, plan, x, ys, weights, parameters, max_rank, in_offset, offsets)


def _dense_gemm(
    arena: torch.Tensor,
    directory: torch.Tensor,
    plan: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    parameter: int,
    max_rank: int,
) -> None:
    _require_arena(arena, directory, [parameter])
    _require("plan", plan, torch.int32, 1, arena.device)
    _require_tokens("x", x, arena.device)
    _require_slices([y], [parameter], x)
    _backend(arena).dense_gemm(arena, directory, plan, x, y, parameter, max_rank)


def _rms_norm(
    arena: torch.Tensor,
    directory: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    parameter: int,
) -> torch.Tensor:
    _require_arena(arena, directory, [parameter])
    _require_slots(slots, arena.device)
    _require_activation("x", x, arena.device)
    _require("weight", weight, x.dtype, 1, arena.device)
    if x.shape[-1] != len(weight) or x.numel() % max(1, len(slots) * len(weight)):
        raise OpError(f"x of shape {list(x.shape)} for {len(slots)} tokens and a norm of {len(weight)} features")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = (len(slots), -1, len(weight))
    if x.numel():
        rows = x.contiguous().view(shape)
        _backend(arena).rms_norm(arena, directory, slots, rows, weight, epsilon, parameter, y.view(shape))
    return y


def _add_bias(
    arena: torch.Tensor,
    directory: torch.Tensor,
    slots: torch.Tensor,
    ys: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    parameters: Sequence[int],
) -> None:
    _require_arena(arena, directory, parameters)
    _require_slots(slots, arena.device)
    if not 1 <= len(ys) <= MAX_SLICES or not len(ys) == len(biases) == len(parameters):
        raise OpError(f"{len(ys)} ys, {len(biases)} biases, {len(parameters)} parameters, expected 1 to 4 of each")
    for y, bias in zip(ys, biases, strict=True):
        _require_tokens("y", y, arena.device)
        if len(y) != len(slots) or y.dtype != ys[0].dtype:
            raise OpError(f"y of shape {list(y.shape)} and {y.dtype} for {len(slots)} tokens of {ys[0].dtype}")
        if bias is not None:
            _require("bias", bias, y.dtype, 1, arena.device)
            if len(bias) != y.shape[1]:
                raise OpError(f"bias of {len(bias)} features for a y of {y.shape[1]}")
    _backend(arena).add_bias(arena, directory, slots, ys, biases, parameters)


def _embed(
    arena: torch.Tensor,
    directory: torch.Tensor,
    slots: torch.Tensor,
    ids: torch.Tensor,
    table: torch.Tensor,
    parameter: int,
) -> torch.Tensor:
    _require_arena(arena, directory, [parameter])
    _require_slots(slots, arena.device)
    _require("ids", ids, torch.int64, 1, arena.device)
    _require_activation("table", table, arena.device)
    if table.dim() != 2 or table.stride(1) != 1 or len(ids) != len(slots):
        raise OpError(f"{len(ids)} ids and a table of shape {list(table.shape)} for {len(slots)} tokens")
    y = table.new_empty(len(ids), table.shape[1])
    _backend(arena).embed(arena, directory, slots, ids, table, parameter, y)
    return y


def _backend(tensor: torch.Tensor) -> type[ops_cpu.Reference] | type[ops_cuda.Kernels]:
    return ops_cuda.Kernels if tensor.is_cuda else ops_cpu.Reference


def _require(name: str, tensor: torch.Tensor, dtype: torch.dtype, dimensions: int, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.dim() != dimensions or tensor.device != device or not tensor.is_contiguous():
        raise OpError(
            f"{name} of {tensor.dtype}, shape {list(tensor.shape)} and strides {list(tensor.stride())} on "
            f"{tensor.device}, expected contiguous {dtype} with {dimensions} dimensions on {device}"
        )


def _require_arena(arena: torch.Tensor, directory: torch.Tensor, parameters: Sequence[int]) -> None:
    _require("arena", arena, torch.uint8, 1, arena.device)
    _require("directory", directory, torch.int64, 3, arena.device)
    if directory.shape[2] != DIRECTORY_FIELDS:
        raise OpError(f"directory of shape {list(directory.shape)}, expected [parameters, slots, {DIRECTORY_FIELDS}]")
    for parameter in parameters:
        if not 0 <= parameter < len(directory):
            raise OpError(f"parameter {parameter}, the directory has {len(directory)}")


def _require_slots(slots: torch.Tensor, device: torch.device) -> None:
    _require("slots", slots, torch.int32, 1, device)
    _require_count(len(slots))


def _require_count(tokens: int) -> None:
    if tokens > MAX_TOKENS:
        raise OpError(f"{tokens} tokens in one step, expected at most {MAX_TOKENS}: cut the prompt into chunks")


def _require_activation(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise OpError(f"{name} on {tensor.device}, the arena is on {device}")
    if not tensor.is_floating_point() or (tensor.is_cuda and tensor.dtype not in GPU_DTYPES):
        raise OpError(f"{name} of {tensor.dtype}, the kernels take float16 and bfloat16")


def _require_tokens(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    _require_activation(name, tensor, device)
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        raise OpError(
            f"{name} of shape {list(tensor.shape)} and strides {list(tensor.stride())}, expected [tokens, features] "
            "with contiguous features"
        )
    _require_count(len(tensor))


def _require_slices(ys: Sequence[torch.Tensor], parameters: Sequence[int], x: torch.Tensor) -> None:
    if not 1 <= len(ys) <= MAX_SLICES or len(ys) != len(parameters):
        raise OpError(f"{len(ys)} ys and {len(parameters)} parameters, expected 1 to {MAX_SLICES} of each")
    for y in ys:
        _require_tokens("y", y, x.device)
        if len(y) != len(x) or y.dtype != x.dtype:
            raise OpError(f"y of shape {list(y.shape)} and {y.dtype} for an x of {list(x.shape)} and {x.dtype}")


def _require_base(base: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], x: torch.Tensor) -> None:
    if len(base) != len(ys):
        raise OpError(f"{len(base)} weights of the base for {len(ys)} ys")
    for weight, y in zip(base, ys, strict=True):
        shape = (y.shape[1], x.shape[1])
        same = weight.shape == shape and weight.dtype == x.dtype and weight.device == x.device
        if not same or weight.stride(1) != 1:
            raise OpError(
                f"base of {weight.dtype}, shape {list(weight.shape)} and strides {list(weight.stride())} on "
                f"{weight.device}, expected {x.dtype} {list(shape)} with contiguous rows on {x.device}"
            )


def _require_weights(weights: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if weights.dtype != torch.float32 or weights.shape != shape or weights.device != device:
        raise OpError(
            f"weights of {weights.dtype} and shape {list(weights.shape)} on {weights.device}, expected float32 "
            f"{list(shape)} on {device}"
        )


def _require_expert_weights(weights: torch.Tensor, x: torch.Tensor) -> None:
    _require_weights(weights, (len(x), MAX_EXPERTS), x.device)
    if weights.stride(1) != 1:
        raise OpError(f"weights of strides {list(weights.stride())}, expected a token's {MAX_EXPERTS} side by side")


def _fake_rms_norm(
    arena: torch.Tensor,
    directory: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    parameter: int,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_embed(
    arena: torch.Tensor,
    directory: torch.Tensor,
    slots: torch.Tensor,
    ids: torch.Tensor,
    table: torch.Tensor,
    parameter: int,
) -> torch.Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


def _fake_nothing(*args: object, **kwargs: object) -> None:
    """Ops that only write into their arguments return nothing."""


_library = torch.library.Library("deltaweave", "DEF")
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plan": (_plan, _fake_nothing),
    "delta_gemm": (_delta_gemm, _fake_nothing),
    "gate": (_gate, _fake_nothing),
    "gated_lora": (_gated_lora, _fake_nothing),
    "dense_gemm": (_dense_gemm, _fake_nothing),
    "rms_norm": (_rms_norm, _fake_rms_norm),
    "add_bias": (_add_bias, _fake_nothing),
    "embed": (_embed, _fake_embed),
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _real, _fake = _IMPLEMENTATIONS[_name]
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _real, _device)
    torch.library.register_fake(f"deltaweave::{_name}", _fake, lib=_library)

plan = torch.ops.deltaweave.plan.default
delta_gemm = torch.ops.deltaweave.delta_gemm.default
dense_gemm = torch.ops.deltaweave.dense_gemm.default
rms_norm = torch.ops.deltaweave.rms_norm.default
add_bias = torch.ops.deltaweave.add_bias.default
gate = torch.ops.deltaweave.gate.default
gated_lora = torch.ops.deltaweave.gated_lora.default
embed = torch.ops.deltaweave.embed.default
