# SPDX-License-Identifier: Apache-2.0
"""One call of dense_gemm over random tenants, against float64, on a GPU or emulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from deltaweave.runtime_plugin.library import Library, Parameter, ParameterKind
from device_arena import Step, placed
from factored_records import RandomBand, RandomRecord
from gpu_checks import Poisoned, assert_close, make_arena
from numpy.typing import NDArray
from table_records import RandomDense, draw_tables

__all__ = ["EMPTY", "FACTORED", "Head", "Setup"]

FACTORED, EMPTY = 10, 11  # slots, behind those of draw_tables


@dataclass
class Head:
    """Sizes of one case; slots are drawn if they are not given."""

    tokens: int = 24
    features: int = 512
    rows: int = 400
    in_offset: int = 0
    group_size: int | None = 128
    chunk: int = 0
    x_shift: int = 0
    slots: tuple[int, ...] | None = None


class Setup:
    """Tenants of a case, a factored and an empty one among them, and what y must become."""

    def __init__(self, library: Library, case: Head, dtype: str, device: str = "cuda") -> None:
        self.library, self.case, self.dtype, self.device = library, case, dtype, device
        rng, kind = np.random.default_rng(case.tokens + case.features), getattr(torch, dtype)
        self.records = draw_tables(rng, case.features, case.rows, case.rows, case.group_size, case.in_offset)
        offset = case.in_offset if case.group_size else 0
        self.factored = RandomRecord.draw(
            rng, (case.rows, case.features), (RandomBand(4, 20),), (case.group_size, case.group_size), (offset, 0)
        )
        parameter = Parameter(ParameterKind.LINEAR, case.features, case.rows, case.in_offset, 0)
        tenants = [*({0: record} for record in self.records), {0: self.factored}]
        self.arena = make_arena(library, [parameter], tenants, size=256 << 20, device=device)
        drawn = rng.integers(-1, EMPTY + 1, case.tokens) if case.slots is None else np.array(case.slots)
        self.slots = torch.from_numpy(drawn.astype(np.int32))
        wide = torch.from_numpy(rng.standard_normal((case.tokens, case.features + 8))).to(kind)
        self.x = placed(wide, device)[:, case.x_shift : case.x_shift + case.features]
        self.before = placed(torch.from_numpy(rng.standard_normal((case.tokens, case.rows)) * 0.1).to(kind), device)

    def run(
        self, slots: torch.Tensor | None = None, chunk: int | None = None, *, both: bool = False
    ) -> NDArray[np.float64]:
        """What y holds afterwards, its margin checked."""
        y = Poisoned((self.case.tokens, self.case.rows), self.x.dtype, device=self.device)
        y.inner.copy_(self.before)
        chunk = self.case.chunk if chunk is None else chunk
        step = Step(self.arena, self.slots if slots is None else slots, chunk=chunk)
        step.make_plan()
        gemm, workspace = step.product(self.x, [(0, y.inner)])
        if both:
            self.library.delta_gemm(gemm)
        self.library.dense_gemm(gemm)
        got = y.numpy()
        assert workspace.numel() == gemm.workspace_bytes
        return got

    def expected(self, t: int, slot: int) -> NDArray[np.float64]:
        """One token's y in float64."""
        y, x = self.before[t].double().cpu().numpy(), self.x[t].double().cpu().numpy()
        if not 0 <= slot < FACTORED:
            return y
        record = self.records[slot]
        if isinstance(record, RandomDense):
            y[: len(record.values)] += record.values @ x
        else:
            y[record.indices] = record.values.astype(np.float64) @ x
        return y

    def check(self, got: NDArray[np.float64]) -> None:
        """Tokens with rows are close, all others untouched."""
        for t, slot in enumerate(self.slots.tolist()):
            note = f"{self.case} token {t} slot {slot}"
            if 0 <= slot < FACTORED:
                assert_close(got[t], self.expected(t, slot), self.dtype, note)
            else:
                assert np.array_equal(got[t], self.expected(t, slot)), note
