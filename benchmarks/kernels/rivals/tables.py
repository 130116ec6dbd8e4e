# SPDX-License-Identifier: Apache-2.0
"""What a finished run says: times of whole models, ratios, goals, and what is missing. Reads the JSON alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cases import MODELS

__all__ = ["Goal", "Results", "Step"]

Row = dict[str, Any]
Step = tuple[int, int]  # tokens, tenants
BASE, OURS = "base", "deltaweave"
MERGED = ("merged-loop", "merged-bmm")
LORA = ("vllm-lora", "vllm-lora-tuned")


@dataclass(frozen=True)
class Goal:
    """One line of the list of goals."""

    name: str
    wanted: str
    got: str
    reached: bool | None


class Results:
    """The rows of a run, looked up by what they are."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.rate: float = content["copy_rate_bytes_per_second"]
        self.rows: list[Row] = content["rows"]
        self._cells: dict[tuple[str, str, str, str], dict[Step, Row]] = defaultdict(dict)
        for row in self.rows:
            if "us" in row:
                key = (row["table"], row["model"], row["group"], row["contender"])
                self._cells[key][row["tokens"], row["tenants"]] = row

    def models(self) -> list[str]:
        """Models that were measured, in order."""
        return _unique(row["model"] for row in self.rows if row["table"] == "models")

    def steps(self, table: str) -> list[Step]:
        """(tokens, tenants) of a table: decode by tenants, then prefill."""
        found = {(row["tokens"], row["tenants"]) for row in self.rows if row["table"] == table}
        return sorted(found, key=lambda step: (step[0] != step[1], step))

    def contenders(self, table: str) -> list[str]:
        """Who has a measurement in a table, in order."""
        return _unique(row["contender"] for row in self.rows if row["table"] == table and "us" in row)

    def cell(self, table: str, model: str, group: str, contender: str, step: Step) -> Row | None:
        """One measurement, or None."""
        return self._cells.get((table, model, group, contender), {}).get(step)

    def model_ms(self, model: str, contender: str, step: Step) -> float | None:
        """All linears of a model; None unless every group was measured."""
        layers, groups = MODELS[model]
        cells = [self.cell("models", model, group.name, contender, step) for group in groups]
        times = [cell["us"] for cell in cells if cell]
        return float(layers * sum(times) / 1e3) if len(times) == len(cells) else None

    def base_ms(self, model: str, step: Step) -> float | None:
        """The faster of cuBLAS and the weights' bytes at the copy rate (a step of few tokens is bound by them)."""
        measured = self.model_ms(model, BASE, step)
        if measured is None or step[0] > 128:
            return measured
        layers, groups = MODELS[model]
        weights = layers * sum(2 * group.in_features * group.out_features for group in groups)
        return min(measured, weights / self.rate * 1e3)

    def model_share(self, model: str, contender: str, step: Step) -> float | None:
        """Weight bytes over time of all linears, against the copy rate."""
        time = self.model_ms(model, contender, step)
        if time is None:
            return None
        layers, groups = MODELS[model]
        cells = [self.cell("models", model, group.name, contender, step) for group in groups]
        return layers * sum(cell["weight_bytes"] for cell in cells if cell) / time * 1e3 / self.rate

    def fastest_ms(self, model: str, contenders: Iterable[str], step: Step) -> float | None:
        """The best of several contenders."""
        times = [time for name in contenders if (time := self.model_ms(model, name, step)) is not None]
        return min(times, default=None)

    def worst_error(self, contender: str, table: str | None = None) -> float | None:
        """The largest error over all of a contender's cases."""
        found = [
            row["error"]
            for row in self.rows
            if row["contender"] == contender and "us" in row and table in (None, row["table"])
        ]
        return max(found, default=None)

    def missing(self) -> dict[str, list[Row]]:
        """What was not measured, by reason."""
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            if "us" not in row:
                groups[row["reason"]].append(row)
        return groups

    def goals(self, model: str = "Llama-2-7B") -> list[Goal]:
        """K1 to K4 of the plan, as far as this run measured them."""
        found = [self._bandwidth_goal()]
        for tenants, limit in ((1, 0.25), (8, 0.75), (32, 2.7), (128, 10.4)):
            step = (tenants, tenants)
            ratio = _ratio(self.model_ms(model, OURS, step), self.base_ms(model, step))
            found.append(_goal(f"K2: delta over base, {tenants} tenant{'s' * (tenants > 1)}", ratio, limit, most=True))
        for tenants in (8, 32, 128):
            step = (tenants, tenants)
            ratio = _ratio(self.fastest_ms(model, LORA, step), self.model_ms(model, OURS, step))
            found.append(_goal(f"K3: LoRA kernels (the faster setting) over delta, {tenants} tenants", ratio, 5.0))
        step = (128, 128)
        delta, base = self.model_ms(model, OURS, step), self.base_ms(model, step)
        served = delta + base if delta is not None and base is not None else None
        ratio = _ratio(self.fastest_ms(model, MERGED, step), served)
        found.append(_goal("K3: 128 separate models over base + delta", ratio, 10.0))
        found.append(_goal("K3: humming over delta, the least of all bands and tenants", self._least_humming(), 1.0))
        for tokens in (512, 2048):
            step = (tokens, 1)
            delta, base = self.model_ms(model, OURS, step), self.base_ms(model, step)
            total = delta + base if delta is not None and base is not None else None
            found.append(
                _goal(f"K4: (base + delta) over base, prefill of {tokens}", _ratio(total, base), 1.65, most=True)
            )
        return found

    def _bandwidth_goal(self) -> Goal:
        shares = [
            row["share"]
            for row in self.rows
            if row["contender"] == OURS
            and row["table"] == "models"
            and "us" in row
            and row["tokens"] == row["tenants"]
            and row["weight_bytes"] >= 64e6
        ]
        name = "K1: share of the copy rate, the least of the preset's launches of 64 MB and more"
        return _goal(name, min(shares, default=None), 0.8, percent=True)

    def _least_humming(self) -> float | None:
        ratios = []
        for (table, model, group, contender), cells in self._cells.items():
            if contender == "humming":
                ours = self._cells.get((table, model, group, OURS), {})
                ratios += [cell["us"] / ours[step]["us"] for step, cell in cells.items() if step in ours]
        return min(ratios, default=None)


def _goal(name: str, got: float | None, limit: float, *, most: bool = False, percent: bool = False) -> Goal:
    style = "{:.0%}" if percent else "{:.2f}"
    wanted = ("at most " if most else "at least ") + (style.format(limit) if percent else f"{limit:g}")
    if got is None:
        return Goal(name, wanted, "not measured", None)
    return Goal(name, wanted, style.format(got), got <= limit if most else got >= limit)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
