# SPDX-License-Identifier: Apache-2.0
"""deltaweave's delta_gemm through runtime_plugin/library/: the only place of the comparison that calls it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cases import GROUP_SIZE, Case, Slice
from .factors import PackedRecord, draw_records
from .workload import Workload

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))  # device_arena.py

if TYPE_CHECKING:
    from deltaweave.runtime_plugin.library import Library, Parameter, Record

__all__ = ["Deltaweave"]

POOL = 4


class Deltaweave(Workload):
    """Packed records of every tenant and layer in one arena; a launch is one call of the fused group."""

    name = "deltaweave"
    label = "deltaweave"

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        from device_arena import DeviceArena, Step

        group = case.group
        self.pools = [
            draw_records(piece, group.in_features, POOL, seed, device) for seed, piece in enumerate(group.slices)
        ]
        parameters = [_parameter(group.in_features, piece.out_features) for piece in group.slices] * layers
        shapes = [_shape(index, self._record(index, 0)) for index in range(len(parameters))]
        max_rank = -(-max(piece.rank for piece in group.slices) // 16) * 16
        probe = DeviceArena(_library(), parameters, slots=1, size=256, max_rank=max_rank)
        size = case.tenants * (probe.arena.tenant_bytes(shapes) + 256)
        self.arena = DeviceArena(_library(), parameters, slots=case.tenants, size=size, max_rank=max_rank)
        for tenant in range(case.tenants):
            slot = self.arena.arena.reserve(shapes)
            for index, shape in enumerate(shapes):
                self.arena.repack(slot, index, shape, _file_tensors(self._record(index, tenant)))
            self.arena.publish(slot)
        self.step = Step(self.arena, torch.arange(case.tokens, dtype=torch.int32) % case.tenants)
        self.step.make_plan()
        self.calls = [self._call(layer) for layer in range(layers)]

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """Codes, grids and sigma as in the file."""
        return case.tenants * sum(_packed_bytes(piece, case.group.in_features) for piece in case.group.slices)

    def launch(self, layer: int) -> None:
        """One dw_delta_gemm; the step's plan is made once for all of its layers, as in a model."""
        gemm, _ = self.calls[layer]
        _library().delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)

    def launch_all(self) -> None:
        """The plan and every layer."""
        self.step.make_plan()
        super().launch_all()

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """From the packed codes."""
        slices = len(self.case.group.slices)
        values = []
        for row in rows:
            x = self.x[row : row + 1].double()
            records = [self._record(layer * slices + place, row % self.case.tenants) for place in range(slices)]
            values.append(torch.cat([record.apply(x) for record in records], dim=1))
        return torch.cat(values)

    def _record(self, index: int, tenant: int) -> PackedRecord:
        """The record of parameter `index`: neighbours in layers and tenants differ."""
        slices = len(self.pools)
        return self.pools[index % slices][(tenant + index // slices) % POOL]

    def _call(self, layer: int) -> Any:
        slices = len(self.pools)
        return self.step.product(self.x, [(layer * slices + place, y) for place, y in enumerate(self.y)])


@cache
def _library() -> Library:
    from deltaweave.runtime_plugin.library import Library

    return Library()


def _parameter(in_features: int, out_features: int) -> Parameter:
    from deltaweave.runtime_plugin.library import Parameter, ParameterKind

    return Parameter(ParameterKind.LINEAR, in_features, out_features, 0, 0)


def _shape(index: int, record: PackedRecord) -> Record:
    from deltaweave.runtime_plugin.library import Record

    return Record.factored(index, [(band.bits, band.rank, "affine") for band in record.v.bands])


def _file_tensors(record: PackedRecord) -> list[torch.Tensor]:
    """V codes, v grid, u codes, u grid, sigma, levels: what the repacking takes."""
    nothing = torch.zeros(1, dtype=torch.uint8, device=record.sigma.device)
    return [record.v.codes, record.v.grid, record.u.codes, record.u.grid, record.sigma, nothing]


def _packed_bytes(piece: Slice, in_features: int) -> int:
    lengths = (in_features, piece.out_features)
    codes = sum(band.rank * -(-length * band.bits // 8) for band in piece.bands for length in lengths)
    groups = sum(-(-length // GROUP_SIZE) for length in lengths)
    return codes + 4 * groups * piece.rank + 4 * piece.rank
