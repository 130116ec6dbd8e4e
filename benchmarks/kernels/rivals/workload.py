# SPDX-License-Identifier: Apache-2.0
"""What a contender is to the benchmark: weights of a case, several layers of them, and one launch a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch

from .cases import Case
from .timing import event_ms

__all__ = ["DTYPE", "Workload", "fastest", "normal", "relative_error"]

DTYPE = torch.bfloat16
CHECKED_ROWS = 4
Candidate = TypeVar("Candidate")


class Workload(ABC):
    """A contender's weights for `layers` layers of a case, on the device.

    Attributes:
        name: on the command line and in the JSON.
        label: in tables and plots.
        compiles: whether its kernels are compiled at run time, so that a worker should do it first.
        accumulates: whether a launch adds to y; the others overwrite it.
        x: [tokens, in_features].
        y: one [tokens, columns] for each output tensor.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    compiles: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = DTYPE

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        self.case = case
        self.layers = layers
        self.device = device
        self.x = normal((case.tokens, case.group.in_features), 1.0, device, self.dtype)
        self.y = self.outputs()

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """Why this contender cannot run a case, or None."""
        return None

    @classmethod
    def warm_case(cls, case: Case) -> Case:
        """A cheaper case that compiles the same kernels."""
        return case

    @classmethod
    def warm_key(cls, case: Case) -> str:
        """Equal for cases that compile the same kernels."""
        pieces = [(piece.out_features, piece.bands) for piece in case.group.slices]
        return f"{case.group.in_features} {pieces} {case.tokens} {case.tenants}"

    @classmethod
    @abstractmethod
    def layer_bytes(cls, case: Case) -> int:
        """Weight bytes that one launch must read."""

    @abstractmethod
    def launch(self, layer: int) -> None:
        """Runs a layer's product on the current stream."""

    @abstractmethod
    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """The float64 product of exactly the weights held, [len(rows), all columns]."""

    def outputs(self) -> list[torch.Tensor]:
        """New outputs: one tensor a slice."""
        return [self.zeros(self.case.tokens, piece.out_features) for piece in self.case.group.slices]

    def zeros(self, *shape: int) -> torch.Tensor:
        """Zeros in the contender's dtype."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def launch_all(self) -> None:
        """Every layer once: what is timed."""
        for layer in range(self.layers):
            self.launch(layer)

    def tenant_rows(self) -> list[slice]:
        """The rows of x that belong to each tenant, where they lie together."""
        tokens = self.case.tokens // self.case.tenants
        return [slice(tenant * tokens, (tenant + 1) * tokens) for tenant in range(self.case.tenants)]

    def error(self, layer: int) -> float:
        """Norm-wise relative error of a layer's product on a few rows, into outputs that were poisoned before."""
        for y in self.y:
            y.fill_(0.0 if self.accumulates else float("nan"))
        self.launch(layer)
        return self.compare(layer)

    def compare(self, layer: int) -> float:
        """The error of what y holds now."""
        count = min(CHECKED_ROWS, self.case.tokens)
        rows = [(self.case.tokens - 1) * i // max(count - 1, 1) for i in range(count)]
        got = torch.cat([y[rows].double() for y in self.y], dim=1)
        return relative_error(got, self.expected(layer, rows))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|."""
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def normal(shape: Sequence[int], std: float, device: str, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Normal values of a standard deviation."""
    return torch.empty(tuple(shape), dtype=dtype, device=device).normal_(0.0, std)


def fastest(candidates: Sequence[Candidate], run: Callable[[Candidate], None], rounds: int = 3) -> Candidate:
    """The candidate of the smallest time; those that the device refuses are left out.

    Raises:
        RuntimeError: all were refused; with the last one's reason.
    """
    times: dict[int, float] = {}
    refusal = "no candidates"
    for place, candidate in enumerate(candidates):
        try:
            run(candidate)
            times[place] = min(event_ms(lambda choice=candidate: run(choice)) for _ in range(rounds))
        except Exception as error:  # a configuration may need more shared memory than there is
            refusal = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    if not times:
        raise RuntimeError(f"every configuration was refused: {refusal}")
    return candidates[min(times, key=lambda place: times[place])]
