# SPDX-License-Identifier: Apache-2.0
"""An arena on a Hugging Face model: every row of a batch is computed by its own tenant, or by the bare base.

Each module that a tenant may change is swapped for one that computes the base's part as before and hands the rest to
the ops, with the slots of the step's tokens. Layers that read the same input (q, k, v; gate, up) share one call.

A row's tenant may be a fusion: each decoder block's gate then weighs its experts by the token that enters the block.
LoRAs lie in the fusion's own slot; an expert that is a delta has a slot of its own, and its term a weight a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deltaweave.runtime_plugin.fit import LENGTH_DEPENDENT, AttachError
from deltaweave.runtime_plugin.fusions import gated_blocks
from deltaweave.runtime_plugin.library import MAX_EXPERTS, MAX_TOKENS
from deltaweave.runtime_plugin.pytorch import ops
from deltaweave.runtime_plugin.pytorch.arena import Arena, FusionWork
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.pytorch.swaps import Attachment, Swap
from deltaweave.runtime_plugin.tables import EMBEDDING, HEAD
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

__all__ = ["ServingAttachment", "serve"]

# Layers of one parent that read the same input.
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


class StepSlots:
    """Whose each row of a batch is, and from that the slots and the plan of a step's tokens. All tensors are static.

    Attributes:
        arena: of the slots.
        rows: int32 [most rows], slots; -1 is the base.
        batch: rows of the steps to come.
        shape: (batch, tokens) that slots and plan are of; (0, 0) if the rows have changed since.
        work: what is done for fusions.
    """

    def __init__(self, arena: Arena) -> None:
        """Begins with the base in every row."""
        device = arena.buffer.device
        self.arena = arena
        self.rows = torch.full((MAX_TOKENS,), -1, dtype=torch.int32, device=device)
        self.batch = 0
        self.shape = (0, 0)
        plan_ints = native_library().plan_bytes(MAX_TOKENS) // 4
        self._slots = torch.full((MAX_TOKENS,), -1, dtype=torch.int32, device=device)
        self._plan = torch.zeros(plan_ints, dtype=torch.int32, device=device)
        self.work = FusionWork()
        self._weights = torch.zeros(MAX_TOKENS, MAX_EXPERTS, dtype=torch.float32, device=device)
        # Rows, tokens and plan of the deltas at each place of a gate.
        self._expert_rows = torch.full((MAX_EXPERTS, MAX_TOKENS), -1, dtype=torch.int32, device=device)
        self._expert_slots = torch.full_like(self._expert_rows, -1)
        self._expert_plans = torch.zeros(MAX_EXPERTS, plan_ints, dtype=torch.int32, device=device)

    def choose(self, tenants: Sequence[str | None], slots: Sequence[int]) -> None:
        """Whose the rows of the steps to come are; the tenants are resident in these slots."""
        self.batch, self.shape, self.work = len(slots), (0, 0), self.arena.fusion_work
        self._fill(self.rows, slots)
        for place in self.work.delta_experts:
            self._fill(self._expert_rows[place], self.arena.expert_slots(tenants, place))

    def _fill(self, rows: torch.Tensor, slots: Sequence[int]) -> None:
        """Copies slots to the device without waiting."""
        values = torch.tensor(slots, dtype=torch.int32)
        rows[: len(slots)].copy_(values.pin_memory() if rows.is_cuda else values, non_blocking=True)

    def lay_out(self, batch: int, tokens: int) -> None:
        """Fills slots and plan for tokens [batch, tokens]; every later call reads them.

        Raises:
            OpError: another number of rows than slots were given for, or too many tokens.
        """
        if batch != self.batch:
            raise ops.OpError(f"a batch of {batch} rows, tenants were chosen for {self.batch}")
        if batch * tokens > MAX_TOKENS:
            raise ops.OpError(f"a step of {batch} x {tokens} tokens, expected at most {MAX_TOKENS}: prefill in chunks")
        slots = self.slots(batch * tokens)
        slots.view(batch, tokens).copy_(self.rows[:batch, None].expand(batch, tokens))
        ops.plan(slots, self.arena.directory.shape[1], self._plan)
        for place in self.work.delta_experts:
            found = self._expert_slots[place, : batch * tokens]
            found.view(batch, tokens).copy_(self._expert_rows[place, :batch, None].expand(batch, tokens))
            ops.plan(found, self.arena.directory.shape[1], self._expert_plans[place])
        self.shape = (batch, tokens)

    def slots(self, tokens: int) -> torch.Tensor:
        """Slots of the step's tokens, int32 [tokens]."""
        return self._slots[:tokens]

    def delta_gemm(
        self,
        x: torch.Tensor,
        ys: Sequence[torch.Tensor],
        parameters: Sequence[int],
        base: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Adds the factored deltas of layers that read x to ys, or to the products of the base's weights; all 2-D."""
        arena = self.arena
        ops.delta_gemm(arena.buffer, arena.directory, self._plan, x, ys, parameters, arena.max_rank, base=base)

    def weigh(self, x: torch.Tensor, gate: int) -> None:
        """Reads a block's input [tokens, hidden_size]; the layers of the block use the weights after it."""
        arena = self.arena
        ops.gate(arena.buffer, arena.directory, self.slots(len(x)), x, gate, self._weights[: len(x)])

    def fusions(self, x: torch.Tensor, ys: Sequence[torch.Tensor], parameters: Sequence[int]) -> None:
        """Adds the weighed experts of layers of a decoder block that read x; all 2-D."""
        if not self.work.gated:
            return
        arena, weights = self.arena, self._weights[: len(x)]
        ops.gated_lora(arena.buffer, arena.directory, self._plan, x, ys, weights, parameters, arena.max_rank)
        for place in self.work.delta_experts:
            plan, own = self._expert_plans[place], weights[:, place]
            ops.delta_gemm(arena.buffer, arena.directory, plan, x, ys, parameters, arena.max_rank, weights=own)

    def dense_gemm(self, x: torch.Tensor, y: torch.Tensor, parameter: int) -> None:
        """Adds or replaces rows of lm_head."""
        arena = self.arena
        ops.dense_gemm(arena.buffer, arena.directory, self._plan, x, y, parameter, arena.max_rank)


class ServedNorm(nn.Module):
    """An RMSNorm with the weight of each token's tenant."""

    def __init__(self, base: Any, step: StepSlots, parameter: int) -> None:
        """`base`: Hugging Face's norm, whose weight is shared."""
        super().__init__()
        self.weight, self.variance_epsilon = base.weight, float(base.variance_epsilon)
        self._step, self._parameter = step, parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, ..., features] to the same."""
        arena, slots = self._step.arena, self._step.slots(x.shape[0] * x.shape[1])
        weight = self.weight.detach()
        y: torch.Tensor = ops.rms_norm(
            arena.buffer, arena.directory, slots, x, weight, self.variance_epsilon, self._parameter
        )
        return y


class ServedEmbedding(nn.Module):
    """An embedding with the rows of each token's tenant. It comes first in a step, so it lays the step's slots out."""

    def __init__(self, base: nn.Embedding, step: StepSlots, parameter: int) -> None:
        """`base`: whose weight is shared."""
        super().__init__()
        self.weight, self.padding_idx = base.weight, base.padding_idx
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self._step, self._parameter = step, parameter

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] token ids to [batch, tokens, embedding_dim]."""
        self._step.lay_out(*ids.shape)
        arena, flat = self._step.arena, ids.reshape(-1)
        slots = self._step.slots(len(flat))
        rows: torch.Tensor = ops.embed(
            arena.buffer, arena.directory, slots, flat, self.weight.detach(), self._parameter
        )
        return rows.view(*ids.shape, -1)


class ServedLinears:
    """Linear layers that read the same input, in one call."""

    def __init__(self, layers: Sequence[nn.Linear], step: StepSlots, weights: Sequence[int], biases: Sequence[int]):
        """Takes the layers' parameters over.

        Args:
            layers: of the base.
            step: whose slots.
            weights: rows of the directory.
            biases: rows of the directory for those layers that have a bias, in order.
        """
        self._layers = [(layer.weight, layer.bias) for layer in layers]
        self._step, self._weights, self._biases = step, list(weights), list(biases)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[..., in_features] to each layer's [..., out_features]."""
        flat = x.reshape(-1, x.shape[-1])
        base = [weight.detach() for weight, _ in self._layers]
        ys = [flat.new_empty(len(flat), len(weight)) for weight in base]
        self._step.delta_gemm(flat, ys, self._weights, base)
        self._step.fusions(flat, ys, self._weights)
        if self._biases:
            self._add_biases(ys)
        return [y.view(*x.shape[:-1], -1) for y in ys]

    def _add_biases(self, ys: list[torch.Tensor]) -> None:
        biased = [(y, bias.detach()) for y, (_, bias) in zip(ys, self._layers, strict=True) if bias is not None]
        targets, biases = [y for y, _ in biased], [bias for _, bias in biased]
        arena, slots = self._step.arena, self._step.slots(len(ys[0]))
        ops.add_bias(arena.buffer, arena.directory, slots, targets, biases, self._biases)


class ServedLinear(nn.Module):
    """One of `ServedLinears`: the first one to see an input computes all, the others find their part."""

    def __init__(self, base: nn.Linear, group: ServedLinears, place: int, shared: dict[int, torch.Tensor]) -> None:
        """`shared` is one dictionary for the whole group: outputs by place that are still to be taken."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self._group, self._place, self._shared = group, place, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if self._place not in self._shared:
            self._shared.update(enumerate(self._group(x)))
        return self._shared.pop(self._place)


class ServedHead(nn.Module):
    """lm_head with each row's tenant; what a tenant's vocabulary lacks has a logit of minus infinity."""

    def __init__(self, base: nn.Linear, step: StepSlots, parameter: int, rows: int) -> None:
        """`rows`: of the largest vocabulary that the arena takes."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, rows
        self._step, self._parameter = step, parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, in_features] to [batch, tokens, out_features]; may be some of a step's tokens."""
        step = self._step
        if step.shape != tuple(x.shape[:2]):
            step.lay_out(*x.shape[:2])
        flat = x.reshape(-1, x.shape[-1])
        y = functional.pad(functional.linear(flat, self.weight.detach()), (0, self.out_features - len(self.weight)))
        step.delta_gemm(flat, [y], [self._parameter])
        step.dense_gemm(flat, y, self._parameter)
        known = step.arena.settings.vocabulary[step.slots(len(flat))]
        missing = torch.arange(self.out_features, device=y.device) >= known[:, None]
        return y.masked_fill_(missing, -torch.inf).view(*x.shape[:2], -1)


class ServedRotary(nn.Module):
    """Rotary embeddings with the frequencies of each row's tenant."""

    def __init__(self, base: Any, step: StepSlots) -> None:
        """`base`: Hugging Face's, of a kind whose frequencies do not follow the length of the text."""
        super().__init__()
        self.config, self.rope_type = base.config, base.rope_type
        self._step = step

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [batch, tokens, head_dim] in the dtype of x; positions [batch or 1, tokens]."""
        rows, settings = self._step.rows[: x.shape[0]], self._step.arena.settings
        angles = position_ids[..., None].float() * settings.inverse_frequencies[rows][:, None]
        angles = torch.cat((angles, angles), dim=-1)
        scale = settings.rotary_scale[rows][:, None, None]
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


class ServingAttachment(Attachment):
    """An arena on a model; `step` says whose the rows are."""

    def __init__(self, swaps: Sequence[Swap], handles: Sequence[RemovableHandle], slots: StepSlots) -> None:
        """Carries out the swaps; use `attach`."""
        super().__init__(swaps, handles)
        self.arena = slots.arena
        self._slots = slots

    @contextmanager
    def step(self, tenants: Sequence[str | None]) -> Iterator[None]:
        """Rows of the batch are computed by these tenants, None being the base, while the block lasts.

        The tenants are made resident first. A block may hold many calls of the model, a whole `model.generate` too.

        Raises:
            ArenaError: no such tenant.
            ArenaFullError: they do not fit together.
        """
        with self.arena.step(tenants) as slots:
            self._slots.choose(tenants, slots)
            yield


def serve(model: nn.Module, arena: Arena) -> ServingAttachment:
    """Makes a model compute the arena's tenants; see `attach`."""
    if arena.table.model is not model:
        raise AttachError("the arena was made for another model object")
    if any(isinstance(module, ServedEmbedding) for module in model.modules()):
        raise AttachError("the model has an arena attached already; detach it first")
    step = StepSlots(arena)
    swaps = list(_swaps(model, step))
    return ServingAttachment(swaps, list(_gates(model, step)), step)


def _gates(model: nn.Module, step: StepSlots) -> Iterator[RemovableHandle]:
    """Lets every decoder block's input be weighed before its layers run."""
    table = step.arena.table
    for block in gated_blocks(table):
        yield model.get_submodule(block).register_forward_pre_hook(_gate(step, table[block].index), with_kwargs=True)


def _gate(step: StepSlots, parameter: int) -> Callable[..., None]:
    def weigh(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if step.work.gated:
            x = arguments[0] if arguments else keywords["hidden_states"]
            step.weigh(x.reshape(-1, x.shape[-1]), parameter)

    return weigh


def _swaps(model: nn.Module, step: StepSlots) -> Iterator[Swap]:
    table = step.arena.table
    fused: set[nn.Module] = set()
    for name, module in list(model.named_modules()):
        for names in FUSED:
            layers = [getattr(module, child, None) for child in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                fused.update(layer for layer in layers if layer is not None)
                yield from _linear_swaps(module, [f"{name}.{child}" for child in names], step)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        parameter = f"{name}.weight"
        if parameter == HEAD:
            yield Swap(owner, child, ServedHead(module, step, table[HEAD].index, table[HEAD].rows))
        elif parameter == EMBEDDING:
            yield Swap(owner, child, ServedEmbedding(module, step, table[EMBEDDING].index))
        elif isinstance(module, nn.Linear) and module not in fused:
            yield from _linear_swaps(owner, [name], step)
        elif type(module).__name__.endswith("RMSNorm"):
            yield Swap(owner, child, ServedNorm(module, step, table[parameter].index))
        elif name == "model.rotary_emb" and module.rope_type not in LENGTH_DEPENDENT:
            yield Swap(owner, child, ServedRotary(module, step))


def _linear_swaps(owner: Any, names: Sequence[str], step: StepSlots) -> Iterator[Swap]:
    table = step.arena.table
    children = [name.rpartition(".")[2] for name in names]
    layers = [getattr(owner, child) for child in children]
    weights = [table[f"{name}.weight"].index for name in names]
    biases = [table[f"{name}.bias"].index for name, layer in zip(names, layers, strict=True) if layer.bias is not None]
    group = ServedLinears(layers, step, weights, biases)
    shared: dict[int, torch.Tensor] = {}
    for place, (child, layer) in enumerate(zip(children, layers, strict=True)):
        yield Swap(owner, child, ServedLinear(layer, group, place, shared))
