# SPDX-License-Identifier: Apache-2.0
"""The laboratory's tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from deltaweave.evaluation import TaskScore
from deltaweave.report.style import MARKERS, Axes, new_figure, plot_style, series_colour, to_png

__all__ = ["bits_of", "lost", "print_tables", "save_plots", "summary"]

Cells = dict[str, dict[str, Any]]
COMPARED = ("against_triple", "prompts_against_triple", "against_triple_16", "prompts_against_triple_16")


def bits_of(right: Sequence[bool]) -> str:
    """Which items were answered rightly, as hexadecimal digits; the first item is the highest bit."""
    return f"{int(''.join('01'[item] for item in right), 2):x}"


def lost(tuned: dict[str, Any], cell: dict[str, Any], count: int, part: str = "held_out") -> tuple[float, float]:
    """(share of items lost against the fine-tune, its standard error), item by item: both answered the same ones."""
    mine, theirs = (int(scores[f"{part}_right"], 16) for scores in (cell, tuned))
    worse, better = (theirs & ~mine).bit_count() / count, (mine & ~theirs).bit_count() / count
    return worse - better, math.sqrt(max(0.0, worse + better - (worse - better) ** 2) / count)


def summary(cells: Cells, count: int) -> dict[str, Any]:
    """By method and ratio: geometric mean of KL, mean of held-out accuracy lost, and over how many fine-tunes.

    `against_triple` is the KL over the preset's at the same ratio, geometric mean over the fine-tunes that have both
    (`prompts_against_triple`: on the prompts' tokens); with `_16` over the preset's at 1/16. `held_out_lost_error` is
    the standard error of what was lost on these items.
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(_kind(key) for key in cells if "1/" in key):
        rows = {_tuning(key): cell for key, cell in cells.items() if _kind(key) == kind}
        ratio = kind.rpartition(" ")[2]
        losses = [lost(cells[f"{name} tuned"], cell, count) for name, cell in rows.items()]
        found[kind] = {
            "fine_tunes": len(rows),
            "kl": _geometric([cell["kl"] for cell in rows.values()]),
            "against_triple": _against(cells, rows, f"triple {ratio}", "kl"),
            "prompts_against_triple": _against(cells, rows, f"triple {ratio}", "kl_prompts"),
            "against_triple_16": _against(cells, rows, "triple 1/16", "kl"),
            "prompts_against_triple_16": _against(cells, rows, "triple 1/16", "kl_prompts"),
            "held_out_lost": _mean([share for share, _ in losses]),
            "held_out_lost_error": math.sqrt(sum(error**2 for _, error in losses)) / len(losses),
            "seen_lost": _mean([cells[f"{name} tuned"]["seen"] - cell["seen"] for name, cell in rows.items()]),
        }
    return found


def print_tables(result: dict[str, Any]) -> None:
    """Everything on the terminal."""
    console, count = Console(width=150), result["settings"]["items"]
    table = Table("fine-tune", "method", "bytes", "seen", "held out", "lost", "KL", "KL of prompts", "perplexity")
    for key, cell in result["cells"].items():
        loss = lost(result["cells"][f"{_tuning(key)} tuned"], cell, count)
        table.add_row(
            _tuning(key),
            _kind(key),
            f"1/{1 / cell['ratio']:.1f}" if cell.get("ratio") else "",
            _share(cell["seen"], count),
            _share(cell["held_out"], count),
            _loss(*loss),
            f"{cell['kl']:.6f}",
            f"{cell['kl_prompts']:.5f}",
            f"{cell['perplexity']:.3f}",
        )
    console.print(table)
    columns = ("over the preset's", "on prompts", "over its 1/16", "on prompts", "held out lost")
    table = Table("method", "fine-tunes", "KL", *columns)
    for kind, row in sorted(result["summary"].items(), key=lambda entry: (_inverse(entry[0]), entry[1]["kl"])):
        factors = [f"{row[name]:.2f}" if row[name] else "" for name in COMPARED]
        loss = _loss(row["held_out_lost"], row["held_out_lost_error"])
        table.add_row(kind, str(row["fine_tunes"]), f"{row['kl']:.6f}", *factors, loss)
    console.print(table)
    console.print(result["caveat"])


def save_plots(result: dict[str, Any], stem: Path) -> list[Path]:
    """Against bytes, a panel a task, a dot a fine-tune, lines through the means of seeds.

    `STEM_kl.png`: KL. `STEM_held_out.png`: share of held-out items lost against the fine-tune, with 95 % intervals.
    """
    cells, count = result["cells"], result["settings"]["items"]
    shown = {key: cell for key, cell in cells.items() if "1/" in key and "," not in key}
    if not shown:
        return []
    points = [
        _Point(_task(key), _method(key), _inverse(_kind(key)), cell["ratio"], cell["kl"], *_lost(cells, key, count))
        for key, cell in shown.items()
    ]
    files = [stem.with_name(f"{stem.name}_{part}.png") for part in ("kl", "held_out")]
    _plot(points, _kl_curve, "KL to the fine-tune", files[0])
    _plot(points, _lost_curve, "held-out items lost", files[1])
    return files


@dataclass(frozen=True)
class _Point:
    """One cell, as it is drawn."""

    task: str
    method: str
    inverse: float
    ratio: float
    kl: float
    lost: float
    lost_error: float


def _plot(points: list[_Point], curve: Callable[..., None], label: str, path: Path) -> None:
    tasks, methods = (list(dict.fromkeys(getattr(point, of) for point in points)) for of in ("task", "method"))
    with plot_style():
        figure, axes = new_figure(3.2 * len(tasks) + 1, 3.4, len(tasks))
        for axis, task in zip(axes, tasks, strict=True):
            for index, method in enumerate(methods):
                mine = [point for point in points if (point.task, point.method) == (task, method)]
                ratios = [
                    [point for point in mine if point.inverse == inverse]
                    for inverse in sorted({point.inverse for point in mine})
                ]
                if ratios:
                    curve(axis, ratios, {"color": series_colour(index), "fmt": f"{_marker(index)}-", "markersize": 5})
            axis.set(title=task, xscale="log", xlim=(7, 80), xlabel="16-bit bytes over stored bytes")
            axis.set_xticks([8, 16, 32, 64], labels=["8", "16", "32", "64"], minor=False)
            axis.minorticks_off()
        limits = [axis.get_ylim() for axis in axes]  # the same in every panel, so that they can be compared
        for axis in axes:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes[0].set(ylabel=label)
        handles = [
            Line2D([], [], color=series_colour(i), marker=_marker(i), label=name) for i, name in enumerate(methods)
        ]
        axes[-1].legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
        to_png(figure, path)


def _kl_curve(axis: Axes, ratios: list[list[_Point]], style: dict[str, Any]) -> None:
    axis.set(yscale="log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axis.errorbar(_sizes(ratios), [_geometric([point.kl for point in seeds]) for seeds in ratios], **style)
    for seeds in ratios:
        axis.plot([1 / point.ratio for point in seeds], [point.kl for point in seeds], ".", color=style["color"])


def _lost_curve(axis: Axes, ratios: list[list[_Point]], style: dict[str, Any]) -> None:
    axis.axhline(0, color="grey", linestyle=":")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    losses = [_mean([point.lost for point in seeds]) for seeds in ratios]
    errors = [1.96 * math.sqrt(sum(point.lost_error**2 for point in seeds)) / len(seeds) for seeds in ratios]
    axis.errorbar(_sizes(ratios), losses, errors, capsize=3, **style)


def _sizes(ratios: list[list[_Point]]) -> list[float]:
    return [_mean([1 / point.ratio for point in seeds]) for seeds in ratios]


def _lost(cells: Cells, key: str, count: int) -> tuple[float, float]:
    return lost(cells[f"{_tuning(key)} tuned"], cells[key], count)


def _marker(index: int) -> str:
    return MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]  # as many colours: a second round must differ


def _tuning(key: str) -> str:
    return " ".join(key.split(" ")[:2])


def _task(key: str) -> str:
    return key.split(" ")[0]


def _kind(key: str) -> str:
    return " ".join(key.split(" ")[2:])


def _method(key: str) -> str:
    return _kind(key).rpartition(" ")[0]


def _inverse(kind: str) -> float:
    return float(kind.rpartition("/")[2])


def _loss(share: float, error: float) -> str:
    return f"{100 * share:.1f} +- {100 * error:.1f}"


def _share(share: float, count: int) -> str:
    low, high = TaskScore(round(share * count), count).interval
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _against(cells: Cells, rows: Cells, other: str, part: str) -> float | None:
    pairs = [(cell[part], cells[f"{name} {other}"][part]) for name, cell in rows.items() if f"{name} {other}" in cells]
    return _geometric([mine / theirs for mine, theirs in pairs if theirs > 0]) if pairs else None


def _geometric(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(max(value, 1e-12)) for value in values]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
