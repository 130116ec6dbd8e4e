# SPDX-License-Identifier: Apache-2.0
"""The laboratory's tables and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from deltaweave.report.style import MARKERS, Axes, new_figure, plot_style, series_colour, to_png

__all__ = ["bits_of", "interval", "lost", "print_tables", "save_plots", "summary"]

Cells = dict[str, dict[str, Any]]
COMPARED = ("against_triple", "prompts_against_triple", "against_triple_16", "prompts_against_triple_16")


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` items."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


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
    """`STEM_kl.png` and `STEM_held_out.png`: quality against bytes, a panel a task; seeds are dots."""
    cells, count = result["cells"], result["settings"]["items"]
    shown = {key: cell for key, cell in cells.items() if "1/" in key and "," not in key}
    if not shown:
        return []
    files = {part: stem.with_name(f"{stem.name}_{part}.png") for part in ("kl", "held_out")}
    labels = {"kl": "KL to the fine-tune", "held_out": "held-out items right"}
    for part, file in files.items():
        _plot(shown, cells, part, labels[part], count, file)
    return list(files.values())


def _plot(shown: Cells, cells: Cells, part: str, label: str, count: int, path: Path) -> None:
    tasks, methods = (list(dict.fromkeys(map(of, shown))) for of in (_task, _method))
    values = [cell[part] for cell in shown.values()]
    with plot_style():
        figure, axes = new_figure(3.2 * len(tasks) + 1, 3.4, len(tasks))
        for axis, task in zip(axes, tasks, strict=True):
            for index, method in enumerate(methods):
                rows = {key: cell for key, cell in shown.items() if (_task(key), _method(key)) == (task, method)}
                if rows:
                    _curve(axis, rows, part, count, index)
            if part == "kl":
                axis.set(yscale="log", ylim=(min(values) / 2, max(values) * 2))  # the same in every panel
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
            else:
                own = [cell[part] for key, cell in cells.items() if _task(key) == task and _kind(key) == "tuned"]
                axis.axhline(_mean(own), color="grey", linestyle=":")
                axis.set(ylim=(0, 1.05))
                axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            axis.set(title=task, xscale="log", xlim=(7, 80), xlabel="16-bit bytes over stored bytes")
            axis.set_xticks([8, 16, 32, 64], labels=["8", "16", "32", "64"], minor=False)
            axis.minorticks_off()
        axes[0].set(ylabel=label)
        handles = [Line2D([], [], color=_colour(i), marker=_marker(i), label=name) for i, name in enumerate(methods)]
        axes[-1].legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
        to_png(figure, path)


def _curve(axis: Axes, rows: Cells, part: str, count: int, index: int) -> None:
    """One method's line through the means of its seeds."""
    ratios: dict[float, list[tuple[float, float]]] = {}
    for key, cell in rows.items():
        ratios.setdefault(_inverse(_kind(key)), []).append((1 / cell["ratio"], cell[part]))
    points = []
    for _, found in sorted(ratios.items()):
        sizes, values = zip(*found, strict=True)
        points.append((_mean(sizes), _geometric(values) if part == "kl" else _mean(values), len(found)))
        if len(found) > 1:
            axis.plot(sizes, values, ".", color=_colour(index), alpha=0.5, markersize=4)
    sizes, values, seeds = zip(*points, strict=True)
    errors = None if part == "kl" else _errors(values, [count * number for number in seeds])
    axis.errorbar(sizes, values, errors, fmt=f"{_marker(index)}-", capsize=3, markersize=5, color=_colour(index))


def _colour(index: int) -> str:
    return series_colour(index)


def _marker(index: int) -> str:
    return MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]  # as many colours: a second round must differ


def _errors(shares: Sequence[float], counts: Sequence[int]) -> list[list[float]]:
    """95 % below and above, as matplotlib wants them."""
    bounds = [interval(share, count) for share, count in zip(shares, counts, strict=True)]
    below = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, bounds, strict=True)]
    return [below, above]


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
    low, high = interval(share, count)
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _against(cells: Cells, rows: Cells, other: str, part: str) -> float | None:
    pairs = [(cell[part], cells[f"{name} {other}"][part]) for name, cell in rows.items() if f"{name} {other}" in cells]
    return _geometric([mine / theirs for mine, theirs in pairs if theirs > 0]) if pairs else None


def _geometric(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(max(value, 1e-12)) for value in values]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
