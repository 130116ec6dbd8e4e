# SPDX-License-Identifier: Apache-2.0
"""The ops on the CPU: plain torch over an arena in the file's order, float32 inside. The oracle of the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from deltaweave.runtime_plugin.library import RecordKind
from deltaweave.runtime_plugin.pytorch.payload import HostRow
from deltaweave.runtime_plugin.pytorch.reference import delta_linear, delta_rows, dense_linear
from torch.nn import functional

__all__ = ["Reference"]

Tensor = torch.Tensor


class Reference:
    """One function an op; `ops` checks the arguments and says what they are."""

    @staticmethod
    def plan(slots: Tensor, slot_count: int, plan: Tensor) -> None:
        """The CPU's plan is the slots themselves; those out of range count as the base."""
        plan.zero_()
        plan[: len(slots)] = torch.where((slots >= 0) & (slots < slot_count), slots, -1)

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
        """Adds the terms of FACTORED records; ranks and offsets of shards stand in the directory."""
        if base is not None:
            for y, weight in zip(ys, base, strict=True):
                torch.mm(x, weight.t(), out=y)
        for y, parameter in zip(ys, parameters, strict=True):
            for row, tokens in _rows(arena, directory, plan[: len(x)], parameter):
                if row.kind is RecordKind.FACTORED:
                    term = delta_linear(x[tokens].float(), row.factored((y.shape[1], x.shape[1])))
                    if weights is not None:
                        term = term * weights[tokens, None]
                    y[tokens] = (y[tokens].float() + term).to(y.dtype)

    @staticmethod
    def gate(arena: Tensor, directory: Tensor, slots: Tensor, x: Tensor, parameter: int, weights: Tensor) -> None:
        """softmax(W x / T) + b in float32, or b; zeros without a record and for experts that it lacks."""
        weights.zero_()
        for row, tokens in _rows(arena, directory, slots, parameter):
            if row.kind is RecordKind.MIX:
                weight, bias, temperature = row.mix(x.shape[1])
                found = bias.expand(len(tokens), -1)
                if weight is not None:
                    found = torch.softmax(x[tokens].float() @ weight.T / temperature, dim=-1) + bias
                weights[tokens, : len(bias)] = found

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
        """Adds the weighed terms of LORA records."""
        for y, parameter in zip(ys, parameters, strict=True):
            for row, tokens in _rows(arena, directory, plan[: len(x)], parameter):
                if row.kind is RecordKind.LORA:
                    outputs, inputs = y[tokens].float(), x[tokens].float()
                    for expert, (a, b, sigma) in enumerate(row.loras((y.shape[1], x.shape[1]))):
                        h = functional.linear(inputs, a.float()) * sigma * weights[tokens, expert, None]
                        outputs += h @ b.float()
                    y[tokens] = outputs.to(y.dtype)

    @staticmethod
    def dense_gemm(
        arena: Tensor, directory: Tensor, plan: Tensor, x: Tensor, y: Tensor, parameter: int, max_rank: int
    ) -> None:
        """Adds the terms of DENSE records and sets the outputs of ROWS records."""
        for row, tokens in _rows(arena, directory, plan[: len(x)], parameter):
            inputs, outputs = x[tokens].float(), y[tokens].float()
            if row.kind is RecordKind.DENSE:
                delta = row.dense(x.shape[1])
                outputs[:, : delta.shape[0]] += dense_linear(inputs, delta)
            elif row.kind is RecordKind.ROWS:
                indices, values = row.rows(x.shape[1])
                outputs[:, indices] = functional.linear(inputs, values.float())
            y[tokens] = outputs.to(y.dtype)

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
        """Rounds where Hugging Face's norms do: once behind the normalization, once behind the weight."""
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
        y.copy_(weight * normed)
        for row, tokens in _rows(arena, directory, slots, parameter):
            if row.kind is RecordKind.VALUES:
                y[tokens] = row.values(len(weight)).to(x.dtype) * normed[tokens]

    @staticmethod
    def add_bias(
        arena: Tensor,
        directory: Tensor,
        slots: Tensor,
        ys: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        parameters: Sequence[int],
    ) -> None:
        """Adds the VALUES of each slot, or the base's."""
        for y, bias, parameter in zip(ys, biases, parameters, strict=True):
            wide = y.float()
            terms = wide.new_zeros(wide.shape) if bias is None else bias.float().expand_as(wide).clone()
            for row, tokens in _rows(arena, directory, slots, parameter):
                if row.kind is RecordKind.VALUES:
                    terms[tokens] = row.values(y.shape[1]).to(y.dtype).float()
            y.copy_(wide + terms)

    @staticmethod
    def embed(
        arena: Tensor, directory: Tensor, slots: Tensor, ids: Tensor, table: Tensor, parameter: int, y: Tensor
    ) -> None:
        """Rows that neither the base nor the record has are zeros."""
        known = (ids >= 0) & (ids < len(table))
        y.copy_(table[torch.where(known, ids, 0)] * known[:, None])
        for row, tokens in _rows(arena, directory, slots, parameter):
            if row.kind is RecordKind.DENSE:
                delta = row.dense(table.shape[1])
                place, found = ids[tokens], (ids[tokens] >= 0) & (ids[tokens] < delta.shape[0])
            elif row.kind is RecordKind.ROWS:
                indices, values = row.rows(table.shape[1])
                place = torch.searchsorted(indices, ids[tokens]).clamp_max(len(indices) - 1)
                found = indices[place] == ids[tokens]
            else:
                continue
            tokens, place = tokens[found], place[found]
            if row.kind is RecordKind.DENSE:
                y[tokens] = (y[tokens].float() + delta_rows(place, delta)).to(y.dtype)
            else:
                y[tokens] = values[place].to(y.dtype)


def _rows(arena: Tensor, directory: Tensor, slots: Tensor, parameter: int) -> Iterator[tuple[HostRow, Tensor]]:
    """The record of every slot that some tokens are of, and those tokens."""
    for slot in slots.unique().tolist():
        if 0 <= slot < directory.shape[1]:
            row = HostRow.find(arena, directory, parameter, slot)
            if row.kind is not None:
                yield row, (slots == slot).nonzero()[:, 0]
