# SPDX-License-Identifier: Apache-2.0
"""What a deployment must keep to: limits of named metrics, from a YAML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltaweave.formats import DeltaweaveError
from deltaweave.validation.measure import Measurement

__all__ = ["METRICS", "REFERENCES", "Check", "Limits", "Metric", "Reference", "Thresholds"]

Reference = Literal["float16", "float32"]
REFERENCES: tuple[Reference, ...] = ("float16", "float32")


@dataclass(frozen=True)
class Metric:
    """One number of a measurement.

    Attributes:
        meaning: in a few words.
        at_most: whether a limit is the largest allowed value; else it is the smallest.
        of: the value; None where it cannot be measured.
    """

    meaning: str
    at_most: bool
    of: Callable[[Measurement], float | None]


def _no_divergence_is_infinite(measurement: Measurement) -> float:
    first = measurement.first_divergence
    return math.inf if first is None else first


METRICS = {
    "kl": Metric("KL to the fine-tune, nats per token", True, lambda m: m.text.kl),
    "worst_kl": Metric("KL of the worst prompt", True, lambda m: _worst([p.text.kl for p in m.prompts])),
    "logit_error": Metric("relative error of the logits", True, lambda m: m.text.logit_error),
    "layer_error": Metric("relative error of the worst layer", True, lambda m: _worst(m.layers) if m.layers else None),
    "top1": Metric("share of tokens with the same most likely next token", False, lambda m: m.text.top1),
    "perplexity_ratio": Metric(
        "perplexity over the fine-tune's", True, lambda m: m.text.perplexity / m.reference_perplexity
    ),
    "greedy_match": Metric("share of prompts with the same greedy text", False, lambda m: m.greedy_match),
    "first_divergence": Metric("earliest new token that differs", False, _no_divergence_is_infinite),
}


def _worst(values: list[float] | tuple[float, ...]) -> float:
    """The largest; what is not a number is worse than any."""
    return next((value for value in values if math.isnan(value)), max(values))


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Limits(BaseModel):
    """Limits of the metrics in METRICS, against one reference; None for no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kl: NotNegative | None = None
    worst_kl: NotNegative | None = None
    logit_error: NotNegative | None = None
    layer_error: NotNegative | None = None
    top1: Share | None = None
    perplexity_ratio: NotNegative | None = None
    greedy_match: Share | None = None
    first_divergence: Annotated[int, Field(ge=0)] | None = None

    def items(self) -> Iterator[tuple[str, float]]:
        """Every limit that is set."""
        for name in METRICS:
            limit = getattr(self, name)
            if limit is not None:
                yield name, limit


@dataclass(frozen=True)
class Check:
    """A limit, and what was measured.

    Attributes:
        reference: dtype of the fine-tune that it is measured against.
        metric: a name in METRICS.
        value: what was measured.
        limit: what is allowed.
        passed: whether it is kept; a value that is not a number keeps nothing.
    """

    reference: Reference
    metric: str
    value: float
    limit: float
    passed: bool

    @property
    def sign(self) -> str:
        """How the value shall stand to the limit."""
        return "<=" if METRICS[self.metric].at_most else ">="

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.6g}, expected {self.sign} {self.limit:.6g} (against {self.reference})"


class Thresholds(BaseModel):
    """Limits by the reference's dtype."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    float16: Limits | None = None
    float32: Limits | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Thresholds:
        """Reads a file such as `float16: {kl: 0.01, top1: 0.98}`.

        Raises:
            DeltaweaveError: naming the file and the key that is wrong.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DeltaweaveError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
        try:
            thresholds = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise DeltaweaveError(f"{path}: {place}: {first['msg']}") from error
        if not any(thresholds.limits(reference) for reference in REFERENCES):
            raise DeltaweaveError(f"{path}: sets no limit; known are {', '.join(METRICS)}, below float16 or float32")
        return thresholds

    def limits(self, reference: Reference) -> dict[str, float]:
        """Limits against one reference, by metric."""
        limits: Limits | None = getattr(self, reference)
        return dict(limits.items()) if limits else {}

    def check(self, reference: Reference, measurement: Measurement) -> Iterator[Check]:
        """Holds a measurement against the limits.

        Raises:
            DeltaweaveError: a limit of something that this subject does not show: it would always hold.
        """
        for name, limit in self.limits(reference).items():
            metric = METRICS[name]
            value = metric.of(measurement)
            if value is None:
                raise DeltaweaveError(f"threshold {reference}.{name}: cannot be measured here; leave it out")
            yield Check(reference, name, value, limit, value <= limit if metric.at_most else value >= limit)
