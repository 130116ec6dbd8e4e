# SPDX-License-Identifier: Apache-2.0
"""Pictures of gates: a heat map of their weights over layers and tokens, and the loss of their training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from deltaweave.converter import OutputError
from deltaweave.gates.look import GateMap
from deltaweave.report.style import COLOURS, light, new_figure, plot_style, series_colour, to_png, to_svg

__all__ = ["save_gate_map", "save_loss_curve"]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>gate weights</title>
<style>:root {{ --font: sans-serif; {variables} }} body {{ margin: 2rem; font-family: sans-serif; }}
svg {{ min-width: {width}px; }}</style></head><body><div style="overflow-x: auto">{drawing}</div></body></html>
"""
MARGIN, PIXELS_PER_TOKEN = 300, 18


def save_gate_map(found: GateMap, path: str | Path) -> Path:
    """Draws the weights, one panel an expert, as `.png`, or as `.html` with text that can be searched.

    Raises:
        OutputError: another ending, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".png", ".html"):
        raise OutputError(f"{path}: expected a name ending in .png or .html")
    with plot_style():
        figure = _gate_figure(found)
    try:
        if path.suffix == ".png":
            to_png(figure, path)
        else:
            path.write_text(_page(figure, found), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def save_loss_curve(losses: Sequence[float], dev_losses: Sequence[float], best_epoch: int, path: str | Path) -> Path:
    """Draws the loss of every step, its running mean, and the dev loss of every epoch, the chosen one marked.

    Raises:
        OutputError: a file that cannot be written.
    """
    path = Path(path)
    with plot_style():
        figure, (axis,) = new_figure(6.5, 3.4)
        steps = np.arange(1, len(losses) + 1)
        axis.plot(steps, losses, color=series_colour(0), alpha=0.35, linewidth=0.8, label="a step")
        width = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axis.plot(steps[width - 1 :], smooth, color=series_colour(0), label=f"mean of {width} steps")
        if dev_losses:
            places = np.linspace(0, len(losses), len(dev_losses))
            axis.plot(places, dev_losses, "o-", color=series_colour(1), label="dev examples")
            axis.plot(
                places[best_epoch], dev_losses[best_epoch], "o", ms=12, mfc="none", mec=light("ink"), label="chosen"
            )
        axis.set(title="training the gates", xlabel="step", ylabel="loss of the answers' tokens")
        axis.legend()
    try:
        to_png(figure, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def _gate_figure(found: GateMap) -> Figure:
    """Layers upwards, tokens to the right; white is off, blue on, red below zero."""
    count, layers, tokens = found.weights.shape
    width = max(6.0, 1.6 + 0.19 * tokens)
    height = count * max(1.6, 0.5 + 0.1 * layers) + 1.2
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    norm = _norm(found.weights)
    for axis, name, weights in zip(axes, found.experts, found.weights, strict=True):
        axis.imshow(weights, cmap="RdBu", norm=norm, aspect="auto", origin="lower", interpolation="nearest")
        axis.set(title=f"{name}: mean {weights.mean():.2f}", ylabel="layer")
        axis.grid(visible=False)
        if 0 < found.prompt_tokens < tokens:
            axis.axvline(found.prompt_tokens - 0.5, color=light("ink"), linewidth=1, linestyle="--")
    axes[-1].set_xticks(range(tokens), [_label(token) for token in found.tokens], rotation=90, fontsize=8)
    figure.colorbar(ScalarMappable(norm, "RdBu"), ax=list(axes), label="weight", aspect=30)
    return figure


def _norm(weights: Any) -> TwoSlopeNorm:
    """Zero in the middle, and one never at its end: what is beyond 0 and 1 must be seen."""
    reach = max(1.0, float(np.abs(weights).max()))
    return TwoSlopeNorm(0.0, -reach, reach)


def _label(token: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    text = token.replace("\n", "\\n").replace(" ", "·")
    return text if len(text) <= 14 else text[:13] + "…"


def _page(figure: Figure, found: GateMap) -> str:
    description = f"weights of {', '.join(found.experts)} over {len(found.tokens)} tokens"
    variables = " ".join(f"--{name}: {value};" for name, (value, _) in COLOURS.items())
    width = MARGIN + PIXELS_PER_TOKEN * len(found.tokens)
    drawing = to_svg(figure, "gate-map", description)
    return PAGE.format(variables=variables, width=width, drawing=drawing)
