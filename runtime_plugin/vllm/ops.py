# SPDX-License-Identifier: Apache-2.0
"""The ops `torch.ops.deltaweave_vllm.*`: what vLLM's layers call, one op a layer, steps of any length. No vLLM here.

    embed  (ids, table, directory)        rows of each token's tenant; lays the step out
    weigh  (x, normed!, gate)             the weights of a block's experts, from its input
    linear (x, y!, weight, bias, directory, ...)
                                          a fused layer's outputs: the base's (without its weight, y has them), deltas,
                                          weighed experts and biases

They are made of `torch.ops.deltaweave.*` and know the arena and the step's slots through `Step.current`. `directory`
has the rows of the layer's own parameters, so that layers of one kind have one graph, whose compilation they share.
An op that reads what another wrote into the step (plans, weights) also reads its output, which keeps their order:
that is what `weigh` says to write `normed` for, and leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deltaweave.runtime_plugin.pytorch import ops
from deltaweave.runtime_plugin.vllm.step import Step

__all__ = ["embed", "linear", "weigh"]

SCHEMAS = {
    "embed": "(Tensor ids, Tensor table, Tensor directory) -> Tensor",
    "weigh": "(Tensor x, Tensor(a!) normed, Tensor gate) -> ()",
    "linear": "(Tensor x, Tensor(a!) y, Tensor? weight, Tensor? bias, Tensor directory, int[] widths, int[] weights, "
    "int[] biases, int in_offset, int[] out_offsets) -> ()",
}


def _embed(ids: torch.Tensor, table: torch.Tensor, directory: torch.Tensor) -> torch.Tensor:
    step = Step.current
    step.lay_out(len(ids))
    buffer = step.arena.buffer
    found = [ops.embed(buffer, directory, step.slots[part], ids[part], table, 0) for part in step.parts(len(ids))]
    return found[0] if len(found) == 1 else torch.cat(found)


def _weigh(x: torch.Tensor, normed: torch.Tensor, gate: torch.Tensor) -> None:
    Step.current.weigh(x, gate)


def _linear(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    directory: torch.Tensor,
    widths: Sequence[int],
    weights: Sequence[int],
    biases: Sequence[int],
    in_offset: int,
    out_offsets: Sequence[int],
) -> None:
    step, ys, base = Step.current, y.split(list(widths), dim=1), None
    if weight is not None and step.active and ops.takes_base(x, [weight]):
        base = weight.split(list(widths))
    elif weight is not None:
        torch.mm(x, weight.t(), out=y)
    step.add(x, ys, directory, weights, in_offset, out_offsets, base)
    if bias is None:
        return
    shared = bias.split(list(widths))
    for part in step.parts(len(x)):
        ops.add_bias(step.arena.buffer, directory, step.slots[part], [piece[part] for piece in ys], shared, biases)


def _fake_embed(ids: torch.Tensor, table: torch.Tensor, directory: torch.Tensor) -> torch.Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


def _fake_nothing(*args: object, **kwargs: object) -> None:
    """Ops that only write into their arguments return nothing."""


_library = torch.library.Library("deltaweave_vllm", "DEF")
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "embed": (_embed, _fake_embed),
    "weigh": (_weigh, _fake_nothing),
    "linear": (_linear, _fake_nothing),
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _real, _fake = _IMPLEMENTATIONS[_name]
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _real, _device)
    torch.library.register_fake(f"deltaweave_vllm::{_name}", _fake, lib=_library)

embed = torch.ops.deltaweave_vllm.embed.default
weigh = torch.ops.deltaweave_vllm.weigh.default
linear = torch.ops.deltaweave_vllm.linear.default
