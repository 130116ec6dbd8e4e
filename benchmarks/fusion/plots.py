# SPDX-License-Identifier: Apache-2.0
"""The experiment's pictures: shares by method, and how the experts' losses fell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter

from deltaweave.report.style import new_figure, plot_style, series_colour, to_png

__all__ = ["save_plots"]

PARTS = {"exact": "all right", "number": "calculation right", "german": "German sentence"}


def save_plots(result: dict[str, Any], stem: Path) -> list[Path]:
    """Writes `STEM_methods.png` and `STEM_experts.png`."""
    return [
        _methods(result, stem.with_name(stem.name + "_methods.png")),
        _experts(result, stem.with_name(stem.name + "_experts.png")),
    ]


def _methods(result: dict[str, Any], path: Path) -> Path:
    names = list(result["methods"])[::-1]
    with plot_style():
        figure, axes = new_figure(9, 1.2 + 0.42 * len(names), len(PARTS))
        for index, (axis, (part, title)) in enumerate(zip(axes, PARTS.items(), strict=True)):
            means = [100 * result["methods"][name][part]["mean"] for name in names]
            spreads = [100 * (result["methods"][name][part]["spread"] or 0) for name in names]
            axis.barh(names, means, xerr=spreads, color=series_colour(index), height=0.62, error_kw={"linewidth": 1})
            for place, mean in enumerate(means):
                axis.text(min(mean + spreads[place] + 2, 88), place, f"{mean:.0f}", va="center", fontsize=8)
            axis.set(title=title, xlim=(0, 100), xlabel="% of items")
            axis.grid(axis="y", visible=False)
            if index:
                axis.set_yticklabels([])
        to_png(figure, path)
    return path


def _experts(result: dict[str, Any], path: Path) -> Path:
    with plot_style():
        figure, (axis,) = new_figure(6, 3.2)
        for index, (name, trained) in enumerate(result["experts"].items()):
            losses = trained["losses"]
            axis.plot(
                [100 * step / len(losses) for step in range(len(losses))],
                losses,
                label=name,
                color=series_colour(index),
            )
        axis.set(title="training loss of the experts", xlabel="% of the steps", ylabel="cross entropy", yscale="log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.legend()
        to_png(figure, path)
    return path
