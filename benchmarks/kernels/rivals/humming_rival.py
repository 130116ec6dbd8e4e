# SPDX-License-Identifier: Apache-2.0
"""humming-kernels: integer weights x bf16, indexed grouped products with a tenant as the expert; one band at a time.

Two products a delta: rank x in_features, then out_features x rank. Symmetric codes with a bf16 scale for each 128
inputs, no zero points, and the second product overwrites its output: less than a delta needs, which favours humming.
Its own heuristics choose the tiles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cases import GROUP_SIZE, Case
from .loading import use_package
from .workload import DTYPE, Workload

__all__ = ["Humming"]

LOCKS = 1 << 16


@dataclass
class _Product:
    """One grouped product [experts, columns, inputs] of one layer, packed and in humming's order."""

    tensors: dict[str, torch.Tensor]
    source: dict[str, torch.Tensor]


class _Shape:
    """What all layers of one of the two products share: configuration, kernel, and the tokens' order."""

    def __init__(self, bits: int, columns: int, inputs: int, case: Case, device: str) -> None:
        from humming.config import ComputeConfig, GemmType, LayerConfig
        from humming.kernel.humming import HummingKernel
        from humming.schema import HummingWeightSchema
        from humming.testing.data import generate_moe_tensors
        from humming.tune import get_heuristics_config

        self.experts, self.columns, self.inputs, self.bits = case.tenants, columns, inputs, bits
        self.schema: Any = HummingWeightSchema(
            b_dtype=f"uint{bits}", bs_dtype="bfloat16", weight_scale_group_size=GROUP_SIZE
        )
        self.config: Any = LayerConfig(
            shape_n=columns,
            shape_k=inputs,
            num_experts=case.tenants,
            b_dtype=f"uint{bits}",
            a_dtype="bfloat16",
            c_dtype="bfloat16",
            bs_dtype="bfloat16",
            weight_scale_group_size=GROUP_SIZE,
        )
        tuning = get_heuristics_config(self.config, shape_m=case.tokens, gemm_type="indexed")
        compute = ComputeConfig(gemm_type=GemmType.INDEXED)
        every_size = [(0, 1 << 30, tuning)]
        self.kernel = HummingKernel.prepare_kernels(self.config.to_str(), compute.to_str(), every_size)
        experts = (torch.arange(case.tokens, dtype=torch.int32, device=device) % case.tenants).unsqueeze(1)
        block = tuning["block_shape"][0]
        _, _, order, owners, count = generate_moe_tensors(experts, case.tenants, GemmType.INDEXED, block)
        self.route = {"sorted_ids": order, "expert_ids": owners, "num_tokens_padded": count}
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)

    def draw(self, device: str) -> _Product:
        """Random codes and scales, and the same in humming's order."""
        from humming.transform import transform_humming_tensors

        words = torch.empty(
            (self.experts, self.columns, self.inputs * self.bits // 32), dtype=torch.int32, device=device
        )
        words.random_(-(2**31), 2**31 - 1)
        groups = self.inputs // GROUP_SIZE
        size = 2.0 / ((1 << self.bits) * self.inputs**0.5)
        scale = size * (0.5 + torch.rand((self.experts, self.columns, groups), device=device))
        source = {"weight": words, "weight_scale": scale.to(DTYPE)}
        return _Product(transform_humming_tensors(self.config, source), source)

    def run(self, product: _Product, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """outputs[t] = W[t % experts] inputs[t]."""
        from humming import ops

        ops.launch_kernel(
            configs=self.kernel,
            inputs=inputs,
            outputs=outputs,
            locks=self.locks,
            top_k=1,
            **self.route,
            **product.tensors,
        )

    def values(self, product: _Product, expert: int) -> torch.Tensor:
        """float64 [columns, inputs] of one expert, by humming's own dequantization."""
        alone = {name: tensor[expert].contiguous() for name, tensor in product.source.items()}
        return self.schema.dequant_tensors(alone).double()  # type: ignore[no-any-return]


class Humming(Workload):
    """Two grouped products a layer."""

    name = "humming"
    label = "humming-kernels, grouped"
    compiles = True
    accumulates = False

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # no processes in the background of a timing
        use_package("humming")
        (piece,) = case.group.slices
        (band,) = piece.bands
        self.shrink = _Shape(band.bits, band.rank, case.group.in_features, case, device)
        self.expand = _Shape(band.bits, piece.out_features, band.rank, case, device)
        self.first = [self.shrink.draw(device) for _ in range(layers)]
        self.second = [self.expand.draw(device) for _ in range(layers)]
        self.h = self.zeros(case.tokens, band.rank)

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One projection, one band."""
        pieces = case.group.slices
        return None if len(pieces) == 1 and len(pieces[0].bands) == 1 else "one band of one projection a call"

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """Codes and scales of both factors."""
        (piece,) = case.group.slices
        elements = piece.rank * (case.group.in_features + piece.out_features)
        return case.tenants * elements * (GROUP_SIZE * piece.bands[0].bits + 16) // (8 * GROUP_SIZE)

    def launch(self, layer: int) -> None:
        """h, then y."""
        self.shrink.run(self.first[layer], self.x, self.h)
        self.expand.run(self.second[layer], self.h, self.y[0])

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """From humming's dequantized weights."""
        values = []
        for row in rows:
            tenant = row % self.case.tenants
            h = self.x[row : row + 1].double() @ self.shrink.values(self.first[layer], tenant).T
            values.append(h @ self.expand.values(self.second[layer], tenant).T)
        return torch.cat(values)
