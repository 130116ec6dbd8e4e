# SPDX-License-Identifier: Apache-2.0
"""Who takes part in which table."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import MODELS, Case, band_cases, model_cases, sweep_cases
from .gemlite_rival import Gemlite
from .humming_rival import Humming
from .ours import Deltaweave
from .torch_rivals import Base, MergedBmm, MergedLoop, TorchBmm, TorchLoop
from .triton_rivals import BitDelta, Dequantize
from .vllm_lora import VllmLora, VllmLoraTuned
from .workload import Workload

__all__ = ["CONTENDERS", "Entry", "plan"]

Entry = tuple[type[Workload], Case]

CONTENDERS: dict[str, type[Workload]] = {
    kind.name: kind
    for kind in (
        *(Deltaweave, Base, MergedLoop, MergedBmm, TorchLoop, TorchBmm, Dequantize, BitDelta),
        *(VllmLora, VllmLoraTuned, Humming, Gemlite),
    )
}
TABLES: dict[str, tuple[type[Workload], ...]] = {
    "models": (
        *(Deltaweave, Base, MergedLoop, MergedBmm, TorchLoop, TorchBmm, Dequantize, BitDelta),
        *(VllmLora, VllmLoraTuned),
    ),
    "bands": (Deltaweave, TorchLoop, TorchBmm, VllmLoraTuned, Humming, Gemlite),
    "sweep": (Deltaweave, TorchLoop, TorchBmm, Dequantize),
}


def plan(models: Sequence[str], tenants: Sequence[int], prefill: Sequence[int], tables: Sequence[str]) -> list[Entry]:
    """Every measurement, the most wanted first: the first model, the bands, the sweep, the other models."""
    named = [model_cases(model, tenants, prefill) for model in (models or MODELS)]
    parts = [*named[:1], band_cases(tenants), sweep_cases(), *named[1:]]
    return [
        (kind, case)
        for part in parts
        for case in part
        if case.table in tables
        for kind in TABLES[case.table]
        if kind.refuses(case) is None
    ]
