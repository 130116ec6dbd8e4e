# SPDX-License-Identifier: Apache-2.0
"""float32 arithmetic whose matrix products run on a GPU's 16-bit tensor cores.

Two models that are compared token by token must not stray from each other by rounding (`drift.py`), and float32
products are what a GPU does slowest. Here both sides of a product are rounded to float16: 11 significant bits,
as many as TF32 has and eight times as fine as bfloat16. They are multiplied exactly and summed in float32, and
everything else stays float32. That is twice as fast as TF32, and weights stored in bfloat16 are not rounded at all.

float16 ends at 65504, so a tensor of larger values is divided by what makes it fit before it is rounded. To know costs
one pass over it and no wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["HalfProducts", "halved", "product"]

# What is rounded is at most this large: half of what float16 ends at.
LARGEST = 2.0**15


class HalfProducts(TorchFunctionMode):
    """While entered, linear layers round both sides of their product, and attention runs in float16.

    Weights may be kept in float16. No gradients.
    """

    def __init__(self) -> None:
        """Has rounded nothing yet."""
        super().__init__()
        self._rounded: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            given = {key: _half(value) for key, value in kwargs.items()}
            return func(*(_half(value) for value in args), **given).float()
        return func(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """From [..., in_features] float32 to [..., out_features]. Layers that share their input round it once."""
        if self._rounded is None or self._rounded[0] is not x:
            self._rounded = x, halved(x.flatten(0, -2), least=1.0)
        rounded, scale = self._rounded[1]
        result: torch.Tensor = product(rounded, (weight.half() * scale).T)
        if bias is not None:
            result += bias
        return result.view(*x.shape[:-1], -1)


def halved(values: torch.Tensor, least: float = torch.finfo(torch.float32).tiny) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` as float16 and what these are to be multiplied by.

    Args:
        values: float32.
        least: the multiplier's lower limit. 1 leaves ordinary values as they are; less moves small ones up to where
            float16 has all its digits.

    Returns:
        float16 values of the same shape, and the multiplier [] float32.
    """
    scale = (torch.linalg.vector_norm(values, torch.inf) / LARGEST).clamp_min(least)
    rounded = torch.empty_like(values, dtype=torch.float16)
    torch.div(values, scale, out=rounded)
    return rounded, scale


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of two float16 matrices in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _half(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.half() if floating else value
