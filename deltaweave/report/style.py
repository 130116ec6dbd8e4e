# SPDX-License-Identifier: Apache-2.0
"""How the plots look, and how one drawing serves light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = [
    "BITS",
    "COLOURS",
    "MARKERS",
    "Axes",
    "band_colour",
    "light",
    "new_figure",
    "plot_style",
    "series_colour",
    "to_png",
    "to_svg",
]

Axes = Any  # matplotlib has no types

# Every colour has a name. Drawings are made with the light values; in the page they become CSS variables, which the
# style sheet sets for light and dark. Series are Okabe and Ito's, which people with any colour vision tell apart.
COLOURS = {
    "ink": ("#1c2128", "#e6edf3"),
    "muted": ("#59636e", "#9aa5b1"),
    "rule": ("#d5dae0", "#343c46"),
    "series-1": ("#0072b2", "#56b4e9"),
    "series-2": ("#d55e00", "#ff8a3d"),
    "series-3": ("#009e73", "#2bc79a"),
    "series-4": ("#a8507f", "#e79fc6"),
    "series-5": ("#b07d00", "#f0c04a"),
    "series-6": ("#5a4fcf", "#a79dff"),
    "series-7": ("#6b6f76", "#b9bec6"),
    "series-8": ("#000000", "#ffffff"),
    "bits-16": ("#3b1f5e", "#c9a8f0"),
    "bits-8": ("#1f4e8c", "#6aa5ea"),
    "bits-4": ("#1b7f8c", "#45c1cf"),
    "bits-3": ("#3f9b5f", "#6fce8f"),
    "bits-2": ("#c2a11e", "#e6c84a"),
    "bits-1": ("#b5651d", "#e69a55"),
}
MARKERS = "oDs^vPX*"
BITS = (16, 8, 4, 3, 2, 1)
SERIES = sum(name.startswith("series") for name in COLOURS)
# Ids of matplotlib's groups are of no use in a page, and several drawings would repeat them.
GROUP_ID = re.compile(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend|\w+Collection)_\d+"')


def light(name: str) -> str:
    """The light value of a named colour."""
    return COLOURS[name][0]


def series_colour(index: int) -> str:
    """The colour of the index-th series."""
    return light(f"series-{index % SERIES + 1}")


def band_colour(bits: int) -> str:
    """The colour of a band."""
    return light(f"bits-{bits}")


SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": light("ink"),
    "axes.titlecolor": light("ink"),
    "axes.labelcolor": light("muted"),
    "axes.edgecolor": light("rule"),
    "xtick.color": light("rule"),
    "ytick.color": light("rule"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "axes.grid": True,
    "grid.color": light("rule"),
    "grid.linewidth": 0.6,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    # Names come from files: a dollar sign in one is no formula.
    "text.parse_math": False,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Drawing inside looks as the report does."""
    with matplotlib.rc_context(SETTINGS):
        yield


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of some inches with axes side by side; to be called, and drawn on, within `plot_style`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, list(axes)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The drawing as an `svg` element that follows the page's colours; text stays text.

    Args:
        figure: made by `new_figure`.
        name: unique in the page.
        description: what a screen reader says instead.
    """
    stream = io.StringIO()
    settings = {**SETTINGS, "svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    drawing = stream.getvalue()
    drawing = GROUP_ID.sub("", drawing[drawing.index("<svg") :])
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font: \1px var(--font)", drawing)
    for colour, (value, _) in COLOURS.items():
        drawing = drawing.replace(value, f"var(--{colour})")
    # The page decides how wide it is; the view box keeps its proportions.
    drawing = re.sub(r' (?:width|height)="[^"]*pt"', "", drawing, count=2)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{_attribute(description)}"', 1)


def to_png(figure: Figure, path: Any) -> None:
    """Writes the drawing with light colours on white."""
    with plot_style():
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def _attribute(text: str) -> str:
    for character, entity in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;")):
        text = text.replace(character, entity)
    return text
