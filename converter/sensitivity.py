# SPDX-License-Identifier: Apache-2.0
"""What an error in a projection costs: its input's second moment and the Fisher information of its output.

To second order, weights that differ by E from the fine-tune's raise KL(fine-tune || model) by vec(E)^T F
vec(E) / 2 a token,
F being the Fisher information. It is taken as a Kronecker product, as in K-FAC (Martens and Grosse, arXiv 1503.05671):
G = E[g g^T] over gradients at the projection's output, times H = E[x x^T] over its inputs. Gradients are those of the
log-probability of tokens drawn from the fine-tune's own predictions, so no labels are needed.

The model is walked forward and then backward, a decoder block in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from deltaweave.converter.calibration import Activations, BlockStream, add_gram
from deltaweave.converter.checkpoint import HEAD
from deltaweave.converter.families import Projection
from torch import nn

__all__ = ["MEASURED_TOKENS", "LayerSensitivity", "layer_sensitivities"]

# Tokens that sensitivities are measured on. All blocks' inputs are held for it: at a hidden size of 4096, 0.27
# GB a layer.
MEASURED_TOKENS = 32768
# Logits held at a time in float32: 2^27 are 512 MiB.
LOGITS = 1 << 27


@dataclass(frozen=True)
class LayerSensitivity:
    """Moments of one decoder block.

    Attributes:
        inputs: H of every projection by its parameter's name, [in_features, in_features] float32, per token.
            Projections of one stage share a tensor.
        outputs: G of every projection, [out_features, out_features] float32, per token.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def layer_sensitivities(
    stream: BlockStream,
    layers: list[list[list[Projection]]],
    activations: list[Activations],
    tokens: int,
    seed: int,
    progress: Callable[[float], None],
) -> Iterator[tuple[int, LayerSensitivity]]:
    """The moments of every block, from the last to the first.

    Args:
        stream: the fine-tune.
        layers: its projections as [layer][stage][position].
        activations: room for every block's input and the last one's output; the first holds the embedded tokens. The
            last ends up with the gradient at the first block's input.
        tokens: in all of them.
        seed: of the tokens drawn.
        progress: told the share that is done.
    """
    count = len(layers)
    for layer in range(count):
        stream.load(layer)
        for rows, hidden in activations[layer].chunks():
            activations[layer + 1].write(rows, stream.forward(layer, hidden))
        stream.unload(layer)
        progress((layer + 1) / count / 4)
    gradients = activations[count]
    _head_gradients(stream, gradients, seed)
    for layer in reversed(range(count)):
        block = stream.load(layer)
        yield layer, _layer_sensitivity(stream, block, layers[layer], activations[layer], gradients, tokens)
        stream.unload(layer)
        progress(1 - layer / count * 3 / 4)


def _head_gradients(stream: BlockStream, outputs: Activations, seed: int) -> None:
    """Replaces the last block's output by the gradient there of the log-probability of drawn tokens."""
    generator = torch.Generator(stream.device).manual_seed(seed)
    checkpoint = stream.checkpoint
    head = checkpoint.tensor(checkpoint.resolve(HEAD) or HEAD).to(stream.device, stream.dtype)
    norm = stream.final_norm()
    step = max(1, LOGITS // head.shape[0])
    for rows, hidden in outputs.chunks():
        flat = hidden.flatten(0, 1)
        gradient = torch.empty_like(flat)
        for start in range(0, len(flat), step):
            piece = flat[start : start + step].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = nn.functional.linear(norm(piece), head).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            (gradient[start : start + step],) = torch.autograd.grad(loss, piece)
        outputs.write(rows, gradient.view_as(hidden))


def _layer_sensitivity(
    stream: BlockStream,
    block: nn.Module,
    stages: list[list[Projection]],
    inputs: Activations,
    gradients: Activations,
    tokens: int,
) -> LayerSensitivity:
    """Moments of a loaded block; `gradients` go from its output to its input."""
    layer = stages[0][0].layer
    moments: dict[str, torch.Tensor] = {}
    handles = []

    def sum_up(name: str, values: torch.Tensor) -> None:
        flat = values.detach().flatten(0, -2)
        if name not in moments:
            moments[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        add_gram(moments[name], flat, 1 / tokens)

    for stage in stages:
        for projection in stage:
            module = block.get_submodule(projection.module)
            name = projection.weight
            handles.append(module.register_forward_hook(_output_watch(name, sum_up)))
        first = block.get_submodule(stage[0].module)
        handles.append(first.register_forward_pre_hook(_input_watch(f"input of {stage[0].weight}", sum_up)))
    try:
        for (rows, hidden), (_, upstream) in zip(inputs.chunks(), gradients.chunks(), strict=True):
            hidden = hidden.detach().requires_grad_(True)
            with torch.enable_grad():
                output = stream.differentiable(layer, hidden)
            (gradient,) = torch.autograd.grad(output, hidden, upstream)
            gradients.write(rows, gradient)
    finally:
        for handle in handles:
            handle.remove()
    shared = {p.weight: moments[f"input of {stage[0].weight}"] for stage in stages for p in stage}
    return LayerSensitivity(shared, {p.weight: moments[p.weight] for stage in stages for p in stage})


def _input_watch(name: str, sum_up: Callable[[str, torch.Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        sum_up(name, arguments[0])

    return hook


def _output_watch(name: str, sum_up: Callable[[str, torch.Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: sum_up(name, gradient))

    return hook
