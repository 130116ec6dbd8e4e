# SPDX-License-Identifier: Apache-2.0
"""What one stage of a block sees when its delta is served, and what the fine-tune would have it give.

Behind compressed layers a projection's input is not what it is in the fine-tune, and the residual stream has strayed.
Each layer can make part of it good: its target is then the fine-tune's own output on the fine-tune's own input, and,
where the output is added to the residual stream, what that stream lacks (asymmetric calibration of GPTQ: GPTAQ,
arXiv 2504.02692, there for the input alone).

Both models are walked in float32, on a GPU with products of 11 bits (`half_products.py`): rounded to bfloat16 they
stray from each other by themselves, and what is fitted to that is noise, on a small model more of it than there is to
correct. The fine-tune goes through a half of a block but once, while the last stage of that half is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.families import Projection
from deltaweave.converter.half_products import halved, product

__all__ = ["OwnStream", "StageMoments", "stage_moments"]


@dataclass(frozen=True)
class OwnStream:
    """The fine-tune as it is, beside the one whose projections are being compressed.

    Attributes:
        stream: its blocks, another `BlockStream` of the same checkpoint.
        inputs: what reaches the half of a block that is being compressed.
    """

    stream: BlockStream
    inputs: Activations

    def advance(self, layer: int) -> None:
        """Puts the output of a loaded block in the place of its input."""
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
    stream: BlockStream, own: OwnStream, projection: Projection, inputs: Activations, report: Callable[[int], None]
) -> StageMoments:
    """The moments of a stage, `stream` and `own` walked side by side up to it.

    Behind the stage that closes a half of the block, `own.inputs` are what that half made of them.

    Args:
        stream: the fine-tune, in whose loaded block earlier stages hold compressed weights.
        own: the fine-tune as it is, the same block loaded.
        projection: the stage's first.
        inputs: what reaches its half of the block behind compressed layers.
        report: told after each piece of `inputs` how many are done.
    """
    out_features, in_features = projection.shape
    rows = [in_features, in_features, *([out_features] if projection.closes_half else [])]
    sums = [torch.zeros(count, in_features, device=stream.device) for count in rows]
    weight = 2 / inputs.shape[0]
    for done, ((_, hidden), (piece, own_hidden)) in enumerate(zip(inputs.chunks(), own.inputs.chunks(), strict=True)):
        x = stream.input_of(projection, hidden)
        if projection.closes_half:
            own_x, output = own.stream.input_and_output(projection, own_hidden)
            strays = [own_x - x, own_hidden - hidden]
            own.inputs.write(piece, output)
        else:
            strays = [own.stream.input_of(projection, own_hidden) - x]
        _add_products(sums, [x, *strays], x, weight, rounded=stream.half_products)
        report(done + 1)
    return StageMoments(*sums)


def _add_products(
    totals: list[torch.Tensor], ys: list[torch.Tensor], x: torch.Tensor, weight: float, *, rounded: bool
) -> None:
    """Adds `weight * y^T x` to each total, the first y being x.

    Args:
        totals: [features of y, features of x] float32 each.
        ys: [..., features of y] float32 each.
        x: [..., features of x] float32.
        weight: a factor.
        rounded: whether values may be rounded to 11 bits.
    """
    if not rounded:
        for total, y in zip(totals, ys, strict=True):
            total.addmm_(y.flatten(0, -2).T, x.flatten(0, -2), alpha=weight)
        return
    right, scale = halved(x.flatten(0, -2))
    for total, y in zip(totals, ys, strict=True):
        left, left_scale = (right, scale) if y is x else halved(y.flatten(0, -2))
        total.addcmul_(product(left.T, right), left_scale * scale, value=weight)
