# SPDX-License-Identifier: Apache-2.0
"""One contender on one case: built, checked against float64, timed. A failure is a row with its reason."""

from __future__ import annotations

import gc
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .cases import Case
from .timing import graph_timing
from .workload import Workload

__all__ = ["Row", "device_works", "layers_for", "measure", "refusal"]

ROTATED_BYTES = 300e6  # weights of a graph: five times the L2
MOST_LAYERS = 32
PREFILL_LAYERS = 4  # bound by arithmetic: fewer do
LEFT_BYTES = 1e9  # more than this after a case is held by a cycle of references
KEPT_BYTES = 60e9  # the allocator may keep this between cases: taking memory from the device costs more than a case


@dataclass(frozen=True)
class Row:
    """A measurement, or why there is none.

    Attributes:
        us: median microseconds of one layer's group; None if it was not measured.
        share: weight bytes of this contender over time, against the copy rate (which counts read plus write).
        error: norm-wise relative error against float64 with the same weights.
        reason: of a missing measurement.
    """

    table: str
    model: str
    group: str
    in_features: int
    out_features: int
    tokens: int
    tenants: int
    model_layers: int
    contender: str
    us: float | None = None
    fastest_us: float | None = None
    slowest_us: float | None = None
    repeats: int = 0
    layers: int = 0
    weight_bytes: int = 0
    share: float | None = None
    error: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what is empty."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, kind: type[Workload], case: Case, **measured: Any) -> Row:
        """A row of a case."""
        group = case.group
        return cls(
            *(case.table, case.model, group.name, group.in_features, group.out_features),
            *(case.tokens, case.tenants, case.layers, kind.name),
            **measured,
        )


def layers_for(kind: type[Workload], case: Case) -> int:
    """Layers that make the weights of a graph many times the L2, so that no launch finds its own cached."""
    most = MOST_LAYERS if case.tokens == case.tenants else PREFILL_LAYERS
    return max(1, min(most, -int(-ROTATED_BYTES // kind.layer_bytes(case))))


def measure(kind: type[Workload], case: Case, rate: float) -> Row:
    """Builds, checks and times; `rate` is the copy rate in bytes a second."""
    layers = layers_for(kind, case)
    try:
        return _measured(kind, case, layers, rate)
    except Exception as error:
        return Row.of(kind, case, reason=refusal(error))
    finally:
        _tidy()


def _measured(kind: type[Workload], case: Case, layers: int, rate: float) -> Row:
    with torch.inference_mode():
        workload = kind(case, layers)
        error = workload.error(layers - 1)
        workload.launch_all()
        timing = graph_timing(workload.launch_all)
    us = timing.median * 1e3 / layers
    read = kind.layer_bytes(case)
    return Row.of(
        kind,
        case,
        us=us,
        fastest_us=timing.fastest * 1e3 / layers,
        slowest_us=timing.slowest * 1e3 / layers,
        repeats=timing.repeats,
        layers=layers,
        weight_bytes=read,
        share=read / us * 1e6 / rate,
        error=error,
    )


def _tidy() -> None:
    """Gives memory back where much is held; collecting garbage every time would cost more than most cases."""
    if torch.cuda.is_available():
        if torch.cuda.memory_allocated() > LEFT_BYTES:
            gc.collect()
        if torch.cuda.memory_reserved() > KEPT_BYTES:
            torch.cuda.empty_cache()


def device_works() -> bool:
    """After an illegal access every later call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def refusal(error: BaseException) -> str:
    """The last line of a traceback; CUDA's errors end with advice and say what happened first."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines() or [type(error).__name__]
    return lines[0 if "CUDA error" in lines[0] else -1].strip()[:300]
