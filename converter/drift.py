# SPDX-License-Identifier: Apache-2.0
"""What one stage of a block sees when its delta is served, and what the fine-tune would have it give.

Behind compressed layers a projection's input is not what it is in the fine-tune, and the residual stream has strayed.
Each layer can make part of it good: its target is then the fine-tune's own output on the fine-tune's own input, and,
where the output is added to the residual stream, what that stream lacks (asymmetric calibration of GPTQ: GPTAQ,
arXiv 2504.02692, there for the input alone).

Both models are walked in float32: rounded to 16 bits they stray from each other by themselves, and what is fitted to
that is noise, on a small model more of it than there is to correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from deltaweave.converter.calibration import Activations, BlockStream, add_gram, add_product

__all__ = ["OwnStream", "StageMoments", "stage_moments"]


@dataclass(frozen=True)
class OwnStream:
    """The fine-tune as it is, beside the one whose projections are being compressed.

    Attributes:
        stream: its blocks, another `BlockStream` of the same checkpoint.
        inputs: what reaches the block that is being compressed.
    """

    stream: BlockStream
    inputs: Activations

    def advance(self, layer: int) -> None:
        """Puts the block's output in the place of its input."""
        for rows, hidden in self.inputs.chunks():
            self.inputs.write(rows, self.stream.forward(layer, hidden))


@dataclass(frozen=True)
class StageMoments:
    """Sums over the calibration text, times 2/n for n sequences.

    Attributes:
        inputs: x x^T, [in_features, in_features] float32, x being the stage's input behind compressed weights.
        strayed: (x* - x) x^T, x* being the fine-tune's own input; None if it is not asked for.
        residual: (r* - r) x^T, [out_features, in_features], r being the stream that the stage's output is added to;
            None where it is added to none.
    """

    inputs: torch.Tensor
    strayed: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def lacking(self, tuned: torch.Tensor) -> torch.Tensor:
        """What a projection's output lacks beside the delta's own part, times x^T.

        Args:
            tuned: the fine-tune's weight, [out_features, in_features] float32.

        Returns:
            [out_features, in_features] float32.
        """
        assert self.strayed is not None
        lacking = tuned @ self.strayed
        return lacking if self.residual is None else lacking + self.residual


def stage_moments(
    stream: BlockStream,
    own: OwnStream,
    layer: int,
    module: str,
    norm: str | None,
    inputs: Activations,
    report: Callable[[int], None],
) -> StageMoments:
    """The moments of a stage, `stream` and `own` walked side by side up to it.

    Args:
        stream: the fine-tune, in whose loaded block earlier stages hold compressed weights.
        own: the fine-tune as it is, the same block loaded.
        layer: the block.
        module: the stage's first projection.
        norm: the norm that reads the residual stream which the stage's output is added to; None where there is none.
        inputs: what reaches the block behind compressed layers.
        report: told after each piece of `inputs` how many are done.
    """
    modules = [module] if norm is None else [norm, module]
    weight = 2 / inputs.shape[0]
    sums: list[torch.Tensor] = []  # of the input itself, what it strayed by, and what the residual stream did
    for done, ((_, hidden), (_, own_hidden)) in enumerate(zip(inputs.chunks(), own.inputs.chunks(), strict=True)):
        seen = [x.flatten(0, -2) for x in stream.inputs_of(layer, modules, hidden)]
        wanted = [x.flatten(0, -2) for x in own.stream.inputs_of(layer, modules, own_hidden)]
        x = seen[-1]
        if not sums:
            rows = [x.shape[1], *(part.shape[1] for part in reversed(seen))]
            sums = [torch.zeros(count, x.shape[1], device=x.device) for count in rows]
        add_gram(sums[0], x, weight)
        for total, mine, theirs in zip(sums[1:], reversed(seen), reversed(wanted), strict=True):
            add_product(total, theirs - mine, x, weight)
        report(done + 1)
    return StageMoments(*sums)
