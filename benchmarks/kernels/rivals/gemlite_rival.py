# SPDX-License-Identifier: Apache-2.0
"""gemlite: Triton products of packed 8, 4, 2 and 1-bit weights; it knows no groups, so a loop over tenants.

fp16, its main type; symmetric codes with an fp16 scale for each 128 inputs. Its own autotuning ("fast") chooses the
tiles. The second product overwrites its output, which is less than a delta needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .cases import GROUP_SIZE, Case
from .loading import use_package
from .workload import Workload

__all__ = ["Gemlite"]


@dataclass
class _Product:
    """One weight [columns, inputs], packed by gemlite, and where its codes and scales came from."""

    layer: Any
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def draw(cls, bits: int, columns: int, inputs: int, device: str) -> _Product:
        """Random codes and scales."""
        from gemlite import DType, GemLiteLinear

        codes = torch.empty((columns, inputs), dtype=torch.uint8, device=device).random_(0, 1 << bits)
        size = 2.0 / ((1 << bits) * inputs**0.5)
        scales = (size * (0.5 + torch.rand((columns * inputs // GROUP_SIZE, 1), device=device))).half()
        layer = GemLiteLinear(bits, GROUP_SIZE, inputs, columns, input_dtype=DType.FP16, output_dtype=DType.FP16)
        layer.pack(codes, scales, _middle(bits), None)
        return cls(layer, codes, scales)

    def values(self, bits: int) -> torch.Tensor:
        """float64 [columns, inputs]."""
        columns, inputs = self.codes.shape
        scales = self.scales.double().view(columns, inputs // GROUP_SIZE).repeat_interleave(GROUP_SIZE, 1)
        return (self.codes.double() - _middle(bits)) * scales


class Gemlite(Workload):
    """Two products a tenant."""

    name = "gemlite"
    label = "gemlite, loop over tenants"
    compiles = True
    accumulates = False
    dtype = torch.float16

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        _load()
        (piece,) = case.group.slices
        (band,) = piece.bands
        self.bits = band.bits
        tenants = range(case.tenants)
        self.products = [
            [
                (
                    _Product.draw(band.bits, band.rank, case.group.in_features, device),
                    _Product.draw(band.bits, piece.out_features, band.rank, device),
                )
                for _ in tenants
            ]
            for _ in range(layers)
        ]
        self.rows = self.tenant_rows()
        self.results = [self.y[0][rows] for rows in self.rows]

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One projection, one band, not of 3 bits."""
        pieces = case.group.slices
        if len(pieces) != 1 or len(pieces[0].bands) != 1:
            return "one band of one projection a call"
        return "no 3-bit weights" if pieces[0].bands[0].bits == 3 else None

    @classmethod
    def warm_case(cls, case: Case) -> Case:
        """A loop over tenants."""
        return replace(case, tokens=1, tenants=1)

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """Codes and scales of both factors."""
        (piece,) = case.group.slices
        elements = piece.rank * (case.group.in_features + piece.out_features)
        return case.tenants * elements * (GROUP_SIZE * piece.bands[0].bits + 16) // (8 * GROUP_SIZE)

    def launch(self, layer: int) -> None:
        """h, then y, tenant after tenant."""
        for tenant, (rows, (first, second)) in enumerate(zip(self.rows, self.products[layer], strict=True)):
            self.results[tenant] = second.layer(first.layer(self.x[rows]))

    def error(self, layer: int) -> float:
        """It returns new tensors; they are put where the check looks."""
        self.launch(layer)
        self.y = [torch.cat(self.results)]
        return self.compare(layer)

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """From the codes and scales given to gemlite."""
        values = []
        for row in rows:
            first, second = (product.values(self.bits) for product in self.products[layer][row % self.case.tenants])
            values.append(self.x[row : row + 1].double() @ first.T @ second.T)
        return torch.cat(values)


@cache
def _load() -> None:
    """Imports it, and lets its autotuning spend 18 ms instead of 125 ms a configuration."""
    use_package("gemlite")
    from gemlite.core import GEMLITE_TRITON_KERNELS
    from triton.testing import do_bench

    for family in GEMLITE_TRITON_KERNELS:
        for kernel in family.kernel:
            kernel._do_bench = lambda call, quantiles: do_bench(call, warmup=3, rep=15, quantiles=quantiles)


def _middle(bits: int) -> int:
    return 1 << (bits - 1)
