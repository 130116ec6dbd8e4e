# SPDX-License-Identifier: Apache-2.0
"""One call of delta_gemm over random tenants, against float64, on a GPU or emulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from deltaweave.runtime_plugin.library import Library, Parameter, ParameterKind
from device_arena import DeviceArena, Step, placed
from factored_records import RandomBand, RandomRecord
from gpu_checks import Poisoned, assert_close

__all__ = ["PRESET", "Case", "Setup", "check"]

PRESET = (RandomBand(8, 2), RandomBand(3, 32), RandomBand(2, 90))


@dataclass
class Case:
    """Sizes of one call; group offsets give tensor-parallel shards."""

    tokens: int = 5
    tenants: int = 3
    in_features: int = 512
    outs: tuple[int, ...] = (384,)
    bands: tuple[RandomBand, ...] = PRESET
    group_sizes: tuple[int | None, int | None] = (128, 128)
    group_offsets: tuple[int, int] = (0, 0)
    dtype: str = "float16"
    chunk: int = 0
    x_gap: int = 0  # elements between rows of x
    slots: list[int] | None = None
    seed: int = 0


class Setup:
    """Tenants of a case on the device, with x and what y must gain."""

    def __init__(self, library: Library, case: Case, device: str = "cuda") -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        offsets = [offset % 128 for offset in case.group_offsets]
        parameters = [Parameter(ParameterKind.LINEAR, case.in_features, out, *offsets) for out in case.outs]
        rank = sum(band.rank for band in case.bands)
        self.arena = DeviceArena(
            library, parameters, slots=case.tenants + 1, size=64 << 20, max_rank=rank, device=device
        )
        self.records = [
            {
                index: RandomRecord.draw(rng, (out, case.in_features), case.bands, case.group_sizes, case.group_offsets)
                for index, out in enumerate(case.outs)
            }
            for _ in range(case.tenants)
        ]
        for slot, tenant in enumerate(self.records):
            assert self.arena.add(tenant) == slot
        drawn = rng.integers(-1, case.tenants, case.tokens) if case.slots is None else np.array(case.slots)
        self.slots = torch.from_numpy(drawn.astype(np.int32))
        wide = torch.from_numpy(rng.standard_normal((case.tokens, case.in_features + case.x_gap)))
        self.x = placed(wide.to(getattr(torch, case.dtype)), device)[:, : case.in_features]

    def expected(self, index: int) -> np.ndarray:
        """The delta term in float64."""
        x = self.x.double().cpu().numpy()
        slots = self.slots.numpy()
        y = np.zeros((len(x), self.case.outs[index]))
        for slot in set(slots[slots >= 0].tolist()):
            y[slots == slot] = self.records[slot][index].apply(x[slots == slot])
        return y

    def run(self, slots: torch.Tensor | None = None, chunk: int | None = None) -> list[torch.Tensor]:
        """Y of zeros, inside a wider poisoned tensor whose margin must survive."""
        ys = [Poisoned((self.case.tokens, out), self.x.dtype, device=self.arena.device) for out in self.case.outs]
        for y in ys:
            y.inner.zero_()
        step = Step(
            self.arena,
            self.slots if slots is None else slots,
            chunk=self.case.chunk if chunk is None else chunk,
        )
        step.run(self.x, [(index, y.inner) for index, y in enumerate(ys)])
        return [y.checked() for y in ys]


def check(library: Library, case: Case, device: str = "cuda") -> None:
    """All that y gains, relative to the term's size."""
    setup = Setup(library, case, device)
    for index, y in enumerate(setup.run()):
        got = y.double().cpu().numpy()
        assert_close(got, setup.expected(index), case.dtype, f"{case} slice {index}", largest=8)
