# SPDX-License-Identifier: Apache-2.0
"""The laboratory's tables and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltaweave.report.style import new_figure, plot_style, series_colour, to_png

__all__ = ["interval", "print_tables", "save_plots", "summary"]

Cells = dict[str, dict[str, Any]]
COMPARED = ("against_triple", "prompts_against_triple", "against_triple_16")


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` items."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def summary(cells: Cells) -> dict[str, Any]:
    """By method and ratio: geometric mean of KL, mean of held-out accuracy lost, and over how many fine-tunes.

    `against_triple` is the KL over the preset's at the same ratio, geometric mean over the fine-tunes that have both
    (`prompts_against_triple`: on the prompts' tokens); `against_triple_16` over the preset's at 1/16.
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(_kind(key) for key in cells if "1/" in key):
        rows = {_tuning(key): cell for key, cell in cells.items() if _kind(key) == kind}
        ratio = kind.rpartition(" ")[2]
        found[kind] = {
            "fine_tunes": len(rows),
            "kl": _geometric([cell["kl"] for cell in rows.values()]),
            "against_triple": _against(cells, rows, f"triple {ratio}", "kl"),
            "prompts_against_triple": _against(cells, rows, f"triple {ratio}", "kl_prompts"),
            "against_triple_16": _against(cells, rows, "triple 1/16", "kl"),
            "held_out_lost": _mean(
                [cells[f"{name} tuned"]["held_out"] - cell["held_out"] for name, cell in rows.items()]
            ),
            "seen_lost": _mean([cells[f"{name} tuned"]["seen"] - cell["seen"] for name, cell in rows.items()]),
        }
    return found


def print_tables(result: dict[str, Any]) -> None:
    """Everything on the terminal."""
    console, count = Console(width=150), result["settings"]["items"]
    table = Table("fine-tune", "method", "bytes", "seen", "held out", "KL", "KL of prompts", "perplexity")
    for key, cell in result["cells"].items():
        table.add_row(
            _tuning(key),
            _kind(key),
            f"1/{1 / cell['ratio']:.1f}" if cell.get("ratio") else "",
            _share(cell["seen"], count),
            _share(cell["held_out"], count),
            f"{cell['kl']:.6f}",
            f"{cell['kl_prompts']:.5f}",
            f"{cell['perplexity']:.3f}",
        )
    console.print(table)
    table = Table("method", "fine-tunes", "KL", "over the preset's", "on prompts", "over its 1/16", "held out lost")
    for kind, row in sorted(result["summary"].items(), key=lambda entry: (_inverse(entry[0]), entry[1]["kl"])):
        factors = [f"{row[name]:.2f}" if row[name] else "" for name in COMPARED]
        table.add_row(kind, str(row["fine_tunes"]), f"{row['kl']:.6f}", *factors, f"{100 * row['held_out_lost']:.1f}")
    console.print(table)
    console.print(result["caveat"])


def save_plots(result: dict[str, Any], stem: Path) -> list[Path]:
    """`STEM_kl.png` and `STEM_held_out.png`: quality against bytes, a panel a fine-tune."""
    names = list(dict.fromkeys(_tuning(key) for key in result["cells"] if "1/" in key and "," not in key))[:4]
    if not names:
        return []
    cells, count = result["cells"], result["settings"]["items"]
    return [
        _plot(cells, names, "kl", "KL to the fine-tune", count, stem.with_name(stem.name + "_kl.png")),
        _plot(cells, names, "held_out", "held-out items right", count, stem.with_name(stem.name + "_held_out.png")),
    ]


def _plot(cells: Cells, names: list[str], part: str, label: str, count: int, path: Path) -> Path:
    methods = list(dict.fromkeys(_method(key) for key in cells if "1/" in key and "," not in key))
    shown = [cell[part] for key, cell in cells.items() if "1/" in key and "," not in key and _tuning(key) in names]
    limits = min(shown) / 2, max(shown) * 2  # the same in every panel, so that they can be compared
    with plot_style():
        figure, axes = new_figure(3.2 * len(names) + 1, 3.4, len(names))
        for axis, name in zip(axes, names, strict=True):
            for index, method in enumerate(methods):
                points = sorted(
                    (1 / cell["ratio"], cell[part])
                    for key, cell in cells.items()
                    if "1/" in key and _tuning(key) == name and _method(key) == method
                )
                if not points:
                    continue
                sizes, values = zip(*points, strict=True)
                errors = None if part == "kl" else _errors(values, count)
                axis.errorbar(sizes, values, errors, fmt="o-", capsize=3, label=method, color=series_colour(index))
            if part == "kl":
                axis.set(yscale="log", ylim=limits)
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
            else:
                axis.axhline(cells[f"{name} tuned"][part], color="grey", linestyle=":")
                axis.set(ylim=(0, 1.05))
                axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            axis.set(title=name, xscale="log", xlim=(7, 80), xlabel="16-bit bytes over stored bytes")
            axis.set_xticks([8, 16, 32, 64], labels=["8", "16", "32", "64"], minor=False)
            axis.minorticks_off()
        axes[0].set(ylabel=label)
        axes[-1].legend(fontsize=7)
        to_png(figure, path)
    return path


def _errors(shares: Sequence[float], count: int) -> list[list[float]]:
    """95 % below and above, as matplotlib wants them."""
    bounds = [interval(share, count) for share in shares]
    below = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, bounds, strict=True)]
    return [below, above]


def _tuning(key: str) -> str:
    return " ".join(key.split(" ")[:2])


def _kind(key: str) -> str:
    return " ".join(key.split(" ")[2:])


def _method(key: str) -> str:
    return _kind(key).rpartition(" ")[0]


def _inverse(kind: str) -> float:
    return float(kind.rpartition("/")[2])


def _share(share: float, count: int) -> str:
    low, high = interval(share, count)
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _against(cells: Cells, rows: Cells, other: str, part: str) -> float | None:
    pairs = [(cell[part], cells[f"{name} {other}"][part]) for name, cell in rows.items() if f"{name} {other}" in cells]
    return _geometric([mine / theirs for mine, theirs in pairs if theirs > 0]) if pairs else None


def _geometric(values: list[float]) -> float:
    return math.exp(_mean([math.log(max(value, 1e-12)) for value in values]))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
