# SPDX-License-Identifier: Apache-2.0
"""What tests of the whole model's kernels share: arenas full of tenants, slots of every kind, outputs with margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from deltaweave.runtime_plugin.library import Library, Parameter
from device_arena import AnyRecord, DeviceArena, placed
from numpy.typing import NDArray

__all__ = ["DTYPES", "POISON", "TOLERANCE", "Poisoned", "as_dtype", "assert_close", "draw_slots", "make_arena"]

TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}
DTYPES = list(TOLERANCE)
POISON = 7.0


def make_arena(
    library: Library,
    parameters: Sequence[Parameter],
    tenants: Sequence[Mapping[int, AnyRecord]],
    size: int = 64 << 20,
    device: str = "cuda",
) -> DeviceArena:
    """An arena with one more slot than tenants; tenant i is in slot i."""
    arena = DeviceArena(library, parameters, slots=len(tenants) + 1, size=size, max_rank=256, device=device)
    for slot, records in enumerate(tenants):
        assert arena.add(records) == slot
    return arena


def draw_slots(rng: np.random.Generator, tokens: int, tenants: int) -> torch.Tensor:
    """Slots of every kind: tenants, the base, an empty slot, and two outside the directory."""
    slots = rng.integers(-1, tenants + 1, tokens)
    if tokens > 2:
        slots[:2] = 99, -7
    return torch.from_numpy(slots.astype(np.int32)).cuda()


class Poisoned:
    """An output of shape [..., features] within a wider tensor whose margin must survive."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, shift: int = 8, device: str = "cuda") -> None:
        self.shift, self.features = shift, shape[-1]
        self.wide = placed(torch.full((*shape[:-1], shape[-1] + 24), POISON, dtype=dtype), device)

    @property
    def inner(self) -> torch.Tensor:
        """The output itself, a view."""
        return self.wide[..., self.shift : self.shift + self.features]

    def checked(self) -> torch.Tensor:
        """What was written, a copy, after a look at the margin."""
        if self.wide.is_cuda:
            torch.cuda.synchronize()
        assert (self.wide[..., : self.shift] == POISON).all(), "wrote in front of y"
        assert (self.wide[..., self.shift + self.features :] == POISON).all(), "wrote behind y"
        return self.inner.clone()

    def numpy(self) -> NDArray[np.float64]:
        """`checked` on the host."""
        return self.checked().double().cpu().numpy()


def as_dtype(values: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """Values rounded to a 16-bit dtype."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()


def assert_close(
    got: NDArray[np.float64], expected: NDArray[np.float64], dtype: str, note: str = "", largest: int = 16
) -> None:
    """Norm-wise and by the largest error over the RMS, which may be so many times as large."""
    error = np.abs(got - expected)
    relative = np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-30)
    worst = np.unravel_index(np.argmax(error), got.shape)
    message = f"{note}: relative {relative}, worst at {worst}: {got[worst]} for {expected[worst]}"
    assert relative < TOLERANCE[dtype], message
    assert error.max() < largest * TOLERANCE[dtype] * (np.sqrt(np.mean(expected**2)) + 1e-30), message
