# SPDX-License-Identifier: Apache-2.0
"""Whose each token of a step is, in memory that never moves: CUDA graphs are captured over it. No vLLM here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from deltaweave.runtime_plugin.library import MAX_EXPERTS, MAX_TOKENS
from deltaweave.runtime_plugin.pytorch import Arena, ops
from deltaweave.runtime_plugin.pytorch.native import native_library
from numpy.typing import NDArray

__all__ = ["Step"]

# Rows of the table of slots: of the step's tokens, of those that are sampled, of the tokens in `SlotSettings` (where
# the base has the last row), and one for each place of a gate.
TOKENS, SAMPLED, SETTINGS, EXPERTS = range(4)


class Step:
    """Slots, plans and expert weights of one step's tokens.

    vLLM's steps may have more tokens than a kernel takes: they are served in parts of 2048, with a plan for each.

    Attributes:
        arena: of the slots.
        slots: int32 [tokens], of the step's tokens; -1 is the base, and so are tokens that only fill a graph up.
        active: whether some token has a tenant. Ops look at this, and at `fused`, when they run or are captured: there
            are graphs for the base alone, for deltas, and for fusions among them, and the one that fits is replayed.
        fused: whether one of these tenants is a fusion.
        own_logits: whether one of them computes or knows other tokens than the base.
        rehearses_fusions: whether stand-ins of the warm-up step to come are fusions.
        fusions: whether tenants may be fusions.
        places: of a gate, those at which deltas may be experts.
        settings_rows: int32 [tokens], the same as rows of the arena's settings.
        current: the process's step. Ops find it here: torch.compile sees them as functions of their arguments alone.
    """

    current: ClassVar[Step]

    def __init__(self, arena: Arena, *, tokens: int, fusions: bool, delta_experts: int) -> None:
        """Takes the memory.

        Args:
            arena: of the tenants.
            tokens: the most of a step.
            fusions: whether gates and LoRAs are computed.
            delta_experts: how many experts of a fusion, the first ones, may be deltas.
        """
        device = arena.buffer.device
        self.arena = arena
        self.active = self.fused = self.own_logits = self.rehearses_fusions = False
        self.fusions = fusions
        self.places = range(delta_experts if fusions else 0)
        self._rows = torch.full((EXPERTS + len(self.places), tokens), -1, dtype=torch.int32, device=device)
        self.slots, self.settings_rows = self._rows[TOKENS], self._rows[SETTINGS]
        parts = -(-tokens // MAX_TOKENS)
        ints = native_library().plan_bytes(min(tokens, MAX_TOKENS)) // 4
        self._plans = torch.zeros(1 + len(self.places), parts, ints, dtype=torch.int32, device=device)
        self._sampled_plan = torch.zeros(ints, dtype=torch.int32, device=device)
        self._weights = torch.zeros(tokens, MAX_EXPERTS, dtype=torch.float32, device=device)
        self._sampled: int | None = 0
        Step.current = self

    def choose(
        self,
        tokens: NDArray[np.int32],
        sampled: NDArray[np.int32],
        experts: Sequence[NDArray[np.int32]] = (),
        *,
        fused: bool = False,
        own_logits: bool = True,
    ) -> None:
        """Whose the tokens of the step to come are; the host does not wait.

        Args:
            tokens: slot of each token, -1 for the base.
            sampled: slot of each row whose logits are wanted first.
            experts: for each of `places`, slot of each token's expert there.
            fused: whether a fusion is among the tenants.
            own_logits: whether the base's logits are not those of all tenants, given what they make of hidden states.
        """
        rows = np.full(tuple(self._rows.shape), -1, np.int32)
        for place, values in zip(
            (TOKENS, SAMPLED, *range(EXPERTS, len(rows))), (tokens, sampled, *experts), strict=True
        ):
            rows[place, : len(values)] = values
        rows[SETTINGS] = np.where(rows[TOKENS] < 0, self.arena.directory.shape[1], rows[TOKENS])
        self.active = bool((rows[TOKENS] >= 0).any())
        self.fused, self.own_logits = self.active and fused, self.active and own_logits
        self._sampled = len(sampled)
        table = torch.from_numpy(rows)
        self._rows.copy_(table.pin_memory() if self._rows.is_cuda else table, non_blocking=True)

    def graph_case(self, adapters: int, fused_case: int) -> int:
        """The number of adapters under which vLLM shall look for a step's CUDA graph, once the step is chosen.

        Args:
            adapters: of the step; in warm-up, the number whose graph is captured next.
            fused_case: a number that no step has, for the graphs with fusions' kernels.
        """
        self.rehearses_fusions = adapters == fused_case
        return fused_case if adapters and self.fused else adapters

    def lay_out(self, tokens: int) -> None:
        """Groups the step's tokens by slot; comes first in a step, and is captured with it."""
        if not self.active:
            return
        count = self.arena.directory.shape[1]
        for number, part in enumerate(self.parts(tokens)):
            ops.plan(self.slots[part], count, self._plans[0, number])
            for place in self.places if self.fused else ():
                ops.plan(self._rows[EXPERTS + place, part], count, self._plans[1 + place, number])

    def parts(self, tokens: int) -> Iterator[slice]:
        """The step's tokens in parts that the kernels take."""
        for start in range(0, tokens, MAX_TOKENS):
            yield slice(start, min(start + MAX_TOKENS, tokens))

    def weigh(self, x: torch.Tensor, directory: torch.Tensor) -> None:
        """Reads a block's input [tokens, hidden_size]; the block's layers use the weights after it."""
        if not self.fused:
            return
        for part in self.parts(len(x)):
            ops.gate(self.arena.buffer, directory, self.slots[part], x[part], 0, self._weights[part])

    def add(
        self,
        x: torch.Tensor,
        ys: Sequence[torch.Tensor],
        directory: torch.Tensor,
        parameters: Sequence[int],
        in_offset: int,
        out_offsets: Sequence[int],
        base: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Adds deltas and weighed experts of layers of a decoder block that read x; all [tokens, features].

        `base`: the base's weights of these layers, whose products shall be in the ys, which hold nothing yet. Only of a
        step that is active.
        """
        if not self.active:
            return
        arena = self.arena
        fixed = (parameters, arena.max_rank, in_offset, out_offsets)
        for number, part in enumerate(self.parts(len(x))):
            inputs, outputs, plan = x[part], [y[part] for y in ys], self._plans[0, number]
            ops.delta_gemm(arena.buffer, directory, plan, inputs, outputs, *fixed, base=base)
            if not self.fused:
                continue
            weights = self._weights[part]
            ops.gated_lora(arena.buffer, directory, plan, inputs, outputs, weights, *fixed)
            for place in self.places:
                plan = self._plans[1 + place, number]
                ops.delta_gemm(arena.buffer, directory, plan, inputs, outputs, *fixed, weights[:, place])

    def logit_slots(self, x: torch.Tensor) -> torch.Tensor:
        """Whose rows of hidden states are, int32 [rows].

        The first logits of a step are those that are sampled from. Later ones, for log-probabilities of a prompt, are
        of a view of the step's hidden states, and its place in them says of which tokens.
        """
        sampled, self._sampled = self._sampled, None
        if sampled is not None:
            return self._rows[SAMPLED, : len(x)]
        first = x.storage_offset() // x.stride(0)
        return self.slots[first : first + len(x)]

    def add_to_logits(
        self, x: torch.Tensor, y: torch.Tensor, slots: torch.Tensor, directory: torch.Tensor, out_offset: int
    ) -> None:
        """Adds or replaces outputs of lm_head, for rows of these slots."""
        arena, plan = self.arena, self._sampled_plan
        for part in self.parts(len(x)):
            ops.plan(slots[part], directory.shape[1], plan)
            ops.delta_gemm(arena.buffer, directory, plan, x[part], [y[part]], [0], arena.max_rank, 0, [out_offset])
            ops.dense_gemm(arena.buffer, directory, plan, x[part], y[part], 0, arena.max_rank)
