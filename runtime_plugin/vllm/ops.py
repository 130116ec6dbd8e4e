# SPDX-License-Identifier: Apache-2.0
"""The ops `torch.ops.deltaweave_vllm.*`: what vLLM's layers call, one op a layer, steps of any length. No vLLM here.

    embed  (ids, table, directory)                rows of each token's tenant; lays the step out
    norm   (x, weight, epsilon, directory, gate)  RMSNorm of each token's tenant, and its experts' weights
    linear (x, y!, bias, directory, ...)          adds deltas, weighed experts and biases to a fused layer's outputs

    settings_rows (positions)                     of each token's tenant in the arena's settings, int64

They are made of `torch.ops.deltaweave.*` and know the arena and the step's slots through `Step.current`. `directory`
has the rows of the layer's own parameters, so that layers of one kind have one graph, whose compilation they share.
An op that reads what another wrote into the step (plans, weights) also reads its output, which keeps their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deltaweave.runtime_plugin.pytorch import ops
from deltaweave.runtime_plugin.vllm.step import Step

__all__ = ["embed", "linear", "norm", "settings_rows"]

SCHEMAS = {
    "embed": "(Tensor ids, Tensor table, Tensor directory) -> Tensor",
    "norm": "(Tensor x, Tensor weight, float epsilon, Tensor directory, Tensor? gate) -> Tensor",
    "linear": "(Tensor x, Tensor(a!) y, Tensor? bias, Tensor directory, int[] widths, int[] weights, int[] biases, "
    "int in_offset, int[] out_offsets) -> ()",
    "settings_rows": "(Tensor positions) -> Tensor",
}


def _embed(ids: torch.Tensor, table: torch.Tensor, directory: torch.Tensor) -> torch.Tensor:
    step = Step.current
    step.lay_out(len(ids))
    buffer = step.arena.buffer
    found = [ops.embed(buffer, directory, step.slots[part], ids[part], table, 0) for part in step.parts(len(ids))]
    return found[0] if len(found) == 1 else torch.cat(found)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, directory: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor:
    step = Step.current
    if gate is not None:
        step.weigh(x, gate)
    buffer = step.arena.buffer
    found = [
        ops.rms_norm(buffer, directory, step.slots[part], x[part], weight, epsilon, 0) for part in step.parts(len(x))
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _linear(
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    directory: torch.Tensor,
    widths: Sequence[int],
    weights: Sequence[int],
    biases: Sequence[int],
    in_offset: int,
    out_offsets: Sequence[int],
) -> None:
    step = Step.current
    ys = y.split(list(widths), dim=1)
    step.add(x, ys, directory, weights, in_offset, out_offsets)
    if bias is None:
        return
    base = bias.split(list(widths))
    for part in step.parts(len(x)):
        ops.add_bias(step.arena.buffer, directory, step.slots[part], [piece[part] for piece in ys], base, biases)


def _settings_rows(positions: torch.Tensor) -> torch.Tensor:
    return Step.current.settings_rows[: len(positions)].long()


def _fake_settings_rows(positions: torch.Tensor) -> torch.Tensor:
    return positions.new_empty(positions.shape[0], dtype=torch.int64)


def _fake_embed(ids: torch.Tensor, table: torch.Tensor, directory: torch.Tensor) -> torch.Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


def _fake_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, directory: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_linear(*args: object, **kwargs: object) -> None:
    """Writes into y."""


_library = torch.library.Library("deltaweave_vllm", "DEF")
_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "embed": (_embed, _fake_embed),
    "norm": (_norm, _fake_norm),
    "linear": (_linear, _fake_linear),
    "settings_rows": (_settings_rows, _fake_settings_rows),
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _real, _fake = _IMPLEMENTATIONS[_name]
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _real, _device)
    torch.library.register_fake(f"deltaweave_vllm::{_name}", _fake, lib=_library)

embed = torch.ops.deltaweave_vllm.embed.default
norm = torch.ops.deltaweave_vllm.norm.default
linear = torch.ops.deltaweave_vllm.linear.default
settings_rows = torch.ops.deltaweave_vllm.settings_rows.default
