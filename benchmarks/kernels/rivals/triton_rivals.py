# SPDX-License-Identifier: Apache-2.0
"""Contenders that run on Triton kernels of this folder: dequantize then cuBLAS, and BitDelta's one-bit deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .cases import Case
from .factors import PackedFactor, PackedRecord, draw_records
from .ours import POOL, Deltaweave
from .torch_rivals import padded_rank, scattered
from .workload import Workload, fastest, normal

__all__ = ["BitDelta", "Dequantize"]


class Dequantize(Workload):
    """The packed factors written out in bf16, one tenant after another, then two cuBLAS products."""

    name = "dequantize"
    label = "dequantize, then cuBLAS"
    compiles = True

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        features = case.group.in_features
        pools = [draw_records(piece, features, POOL, seed, device) for seed, piece in enumerate(case.group.slices)]
        self.records: list[list[list[PackedRecord]]] = [
            [[pool[(layer + tenant) % POOL].clone() for pool in pools] for tenant in range(case.tenants)]
            for layer in range(layers)
        ]
        ranks = [padded_rank(piece.rank) for piece in case.group.slices]
        outs = [piece.out_features for piece in case.group.slices]
        self.scratch = [
            (self.zeros(rank, features), self.zeros(rank, out)) for rank, out in zip(ranks, outs, strict=True)
        ]
        self.h = [self.zeros(case.tokens, rank) for rank in ranks]
        self.rows = self.tenant_rows()

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One token a tenant, or one tenant."""
        return scattered(case)

    @classmethod
    def warm_case(cls, case: Case) -> Case:
        """The kernels know nothing of tokens."""
        return replace(case, tokens=1, tenants=1)

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """The packed bytes; what is written out comes on top."""
        return Deltaweave.layer_bytes(case)

    def launch(self, layer: int) -> None:
        """For every tenant and slice: V, h, U, y."""
        for rows, records in zip(self.rows, self.records[layer], strict=True):
            for record, (v, u), h, y in zip(records, self.scratch, self.h, self.y, strict=True):
                _write(record.v, v, record.sigma)
                torch.mm(self.x[rows], v.T, out=h[rows])
                _write(record.u, u, None)
                y[rows].addmm_(h[rows], u)

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """From the packed codes."""
        tenants = self.records[layer]
        values = []
        for row in rows:
            x = self.x[row : row + 1].double()
            records = tenants[row % self.case.tenants]
            values.append(torch.cat([record.apply(x) for record in records], dim=1))
        return torch.cat(values)


def _write(factor: PackedFactor, out: torch.Tensor, sigma: torch.Tensor | None) -> None:
    from .triton_kernels import dequantize

    row = 0
    for band in factor.packed_bands():
        rows = slice(row, row + len(band.codes))
        dequantize(band, out[rows], None if sigma is None else sigma[rows])
        row = rows.stop


class BitDelta(Workload):
    """One sign an element of the whole matrix and one scale a matrix: 1/16 of its bf16 bytes, as the preset."""

    name = "bitdelta"
    label = "BitDelta, 1-bit bmm (Triton)"
    compiles = True
    # Tile of outputs and inputs, whether words are loaded once, warps, stages.
    TILES = (
        (32, 128, False, 4, 4),
        (64, 128, False, 4, 3),
        (128, 64, False, 8, 3),
        (32, 128, True, 4, 4),
        (32, 256, True, 4, 3),
        (64, 128, True, 4, 4),
        (128, 64, True, 4, 4),
        (128, 128, True, 8, 3),
    )

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        features = case.group.in_features
        self.packed, self.scale = [], []
        for piece in case.group.slices:
            words = torch.empty(
                (layers, case.tenants, features // 32, piece.out_features), dtype=torch.int32, device=device
            )
            self.packed.append(words.random_(-(2**31), 2**31 - 1))
            self.scale.append(normal((layers, case.tenants), features**-0.5, device, torch.float32).abs_())
        each = case.tokens // case.tenants
        self.x3 = self.x.view(case.tenants, each, features)
        self.y3 = [y.view(case.tenants, each, y.shape[1]) for y in self.y]
        self.rows_tile = 16 if each <= 16 else 64
        self.tile = fastest(self.TILES, lambda tile: self._launch(0, tile))

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One token a tenant, or one tenant."""
        return scattered(case)

    @classmethod
    def warm_case(cls, case: Case) -> Case:
        """Tenants are a grid dimension."""
        return replace(case, tokens=2, tenants=2) if case.tenants > 1 else case

    @classmethod
    def warm_key(cls, case: Case) -> str:
        """Sizes are arguments; only one token a tenant is a constant."""
        return str(case.tokens // case.tenants)

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """One bit an element."""
        return case.tenants * case.group.out_features * case.group.in_features // 8

    def launch(self, layer: int) -> None:
        """One kernel a slice."""
        self._launch(layer, self.tile)

    def _launch(self, layer: int, tile: tuple[int, int, bool, int, int]) -> None:
        from .triton_kernels import bit_delta

        columns, inputs, once, warps, stages = tile
        for packed, scale, y in zip(self.packed, self.scale, self.y3, strict=True):
            bit_delta(self.x3, packed[layer], scale[layer], y, (self.rows_tile, columns, inputs), once, warps, stages)

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """From the signs."""
        values = []
        for row in rows:
            tenant = row % self.case.tenants
            x = self.x[row : row + 1].double()
            pieces = zip(self.packed, self.scale, strict=True)
            values.append(torch.cat([x @ _signs(p[layer, tenant]) * s[layer, tenant] for p, s in pieces], dim=1))
        return torch.cat(values)


def _signs(packed: torch.Tensor) -> torch.Tensor:
    """float64 [in, out] of packed int32 [in / 32, out]."""
    shifts = torch.arange(32, dtype=torch.int32, device=packed.device).view(1, 32, 1)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return (2 * bits - 1).flatten(0, 1).to(torch.float64)
