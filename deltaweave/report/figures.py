# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: quality against bytes, bytes by kind, errors, spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from deltaweave.evaluation import Candidate, Comparison
from deltaweave.report.details import DeltaDetails, LayerError, Spectrum
from deltaweave.report.style import MARKERS, Axes, band_colour, light, new_figure, series_colour

__all__ = ["Plot", "byte_kinds", "comparison_plots", "delta_plots"]

# Past this many layers their spectra are drawn as a range around the median.
FEW_LAYERS = 6


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        name: unique, fit for a file name.
        title: above it in the page.
        description: what it shows, in words, for those who do not see it.
        figure: the drawing.
    """

    name: str
    title: str
    description: str
    figure: Figure


def comparison_plots(comparison: Comparison, details: Sequence[DeltaDetails]) -> Iterator[Plot]:
    """Plots over all deltas, for what was measured."""
    deltas = comparison.candidates[2:]
    if any(delta.task for delta in deltas):
        yield _accuracy(comparison, deltas)
    if any(delta.text for delta in deltas):
        yield _divergence(deltas)
    if details:
        yield _bytes(details)
    for measure, title in (("weight", "error of the delta"), ("output", "error of the delta's output")):
        if any(getattr(error, measure) is not None for detail in details for error in detail.errors):
            yield _kind_errors(details, measure, title)


def delta_plots(details: DeltaDetails, index: int) -> Iterator[Plot]:
    """Plots of one delta, the index-th: spectra per kind of projection, errors per layer."""
    for kind in details.kinds:
        spectra = [spectrum for spectrum in details.spectra if spectrum.kind == kind and (spectrum.sigma > 0).any()]
        if spectra:
            yield _spectrum(details, kind, spectra, f"{index}-{details.name}")
    measured = [
        name for name in ("weight", "output") if any(_value(error, name) is not None for error in details.errors)
    ]
    if measured:
        yield _layer_errors(details, measured, f"{index}-{details.name}")


def byte_kinds(details: DeltaDetails) -> list[tuple[str, int]]:
    """Where a file's bytes go, in the order in which they are drawn."""
    count = details.bytes
    return [
        ("codes", count.codes),
        ("scales and zeros", count.grids),
        ("sigma", count.sigma),
        ("padding", count.padding),
        ("norms, biases, embeddings", count.other),
        ("tokenizer and settings", count.carried),
        ("header", count.header),
    ]


def _accuracy(comparison: Comparison, deltas: Sequence[Candidate]) -> Plot:
    figure, (axes,) = new_figure(5.2, 3.4)
    for index, delta in enumerate(deltas):
        if delta.task is not None and delta.file_bytes is not None:
            value, (low, high) = 100 * delta.task.accuracy, delta.task.interval
            error = [[value - 100 * low], [100 * high - value]]
            _point(axes, index, delta.name, delta.file_bytes, value, error)
    for reference in comparison.candidates[:2]:
        if reference.task is not None:
            _level(axes, reference.name, 100 * reference.task.accuracy)
    _byte_axis(axes, logarithmic=True)
    axes.set_ylabel("accuracy, % (95 % interval)")
    axes.legend(loc="best")
    return Plot(
        "quality-accuracy",
        "Task accuracy against bytes",
        _told(deltas, "accuracy", lambda d: d.task and d.task.accuracy),
        figure,
    )


def _divergence(deltas: Sequence[Candidate]) -> Plot:
    figure, (axes,) = new_figure(5.2, 3.4)
    for index, delta in enumerate(deltas):
        if delta.text is not None and delta.file_bytes is not None:
            value, spread = delta.text.kl, 1.96 * delta.text.kl_error
            _point(axes, index, delta.name, delta.file_bytes, value, [[min(spread, 0.9 * value)], [spread]])
    if all(delta.text is None or delta.text.kl > 0 for delta in deltas):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _byte_axis(axes, logarithmic=True)
    axes.set_ylabel("KL to the fine-tune, nats per token")
    axes.legend(loc="best")
    return Plot(
        "quality-kl",
        "Distance to the fine-tune against bytes",
        _told(deltas, "KL", lambda d: d.text and d.text.kl),
        figure,
    )


def _bytes(details: Sequence[DeltaDetails]) -> Plot:
    figure, (axes,) = new_figure(10.6, 1.3 + 0.42 * len(details))
    left = np.zeros(len(details))
    names = [detail.name for detail in details]
    colours = ["series-1", "series-5", "series-2", "rule", "series-3", "series-4", "series-7"]
    for place, colour in enumerate(colours):
        label = byte_kinds(details[0])[place][0]
        sizes = np.array([byte_kinds(detail)[place][1] for detail in details], dtype=float)
        axes.barh(names, sizes, left=left, height=0.6, color=light(colour), label=label)
        left += sizes
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    _byte_axis(axes, logarithmic=False)
    figure.legend(loc="outside upper left", ncols=4)
    told = "; ".join(
        f"{detail.name}: " + ", ".join(f"{kind} {size}" for kind, size in byte_kinds(detail)) for detail in details
    )
    return Plot("bytes", "Bytes by kind", f"Bytes of each file by kind. {told}.", figure)


def _kind_errors(details: Sequence[DeltaDetails], measure: str, title: str) -> Plot:
    kinds = list(dict.fromkeys(kind for detail in details for kind in detail.kinds))
    figure, (axes,) = new_figure(5.2, 1.5 + 0.34 * len(kinds))
    for index, detail in enumerate(details):
        shift = 0.56 * ((index + 0.5) / len(details) - 0.5)
        label: str | None = detail.name
        for row, kind in enumerate(kinds):
            values = [
                value for error in detail.errors if error.kind == kind and (value := _value(error, measure)) is not None
            ]
            if not values:
                continue
            colour = series_colour(index)
            axes.plot([min(values), max(values)], [row + shift] * 2, color=colour, linewidth=1.5, alpha=0.55)
            axes.plot(
                np.mean(values), row + shift, MARKERS[index % len(MARKERS)], color=colour, markersize=5.5,
                linestyle="none", label=label,
            )  # fmt: skip
            label = None
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("relative error; mark: mean, line: range over layers")
    figure.legend(loc="outside upper left", ncols=2)
    return Plot(
        f"errors-{measure}",
        f"Relative {title}",
        f"Relative {title} for each kind of projection and each delta.",
        figure,
    )


def _layer_errors(details: DeltaDetails, measured: Sequence[str], name: str) -> Plot:
    figure, panels = new_figure(5.2 * len(measured), 3.4, columns=len(measured))
    titles = {"weight": "of the delta", "output": "of its output on calibration data"}
    for axes, measure in zip(panels, measured, strict=True):
        for index, kind in enumerate(details.kinds):
            points = [
                (error.layer, value)
                for error in details.errors
                if error.kind == kind and (value := _value(error, measure)) is not None
            ]
            axes.plot(
                *zip(*points, strict=True), marker=MARKERS[index % len(MARKERS)], markersize=4.5, linewidth=1.2,
                color=series_colour(index), label=kind if measure == measured[0] else None,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_title(titles[measure])
    panels[0].set_ylabel("relative error")
    figure.legend(loc="outside upper left", ncols=7)
    return Plot(
        f"layers-{name}",
        "Relative error per layer",
        f"Relative error of every projection of {details.name} over layers.",
        figure,
    )


def _spectrum(details: DeltaDetails, kind: str, spectra: Sequence[Spectrum], name: str) -> Plot:
    figure, (axes,) = new_figure(3.5, 2.5)
    shown = spectra[len(spectra) // 2]
    _shade_bands(axes, shown)
    curves = _padded([spectrum.sigma for spectrum in spectra])
    ranks = np.arange(1, curves.shape[1] + 1)
    if len(spectra) <= FEW_LAYERS:
        axes.plot(ranks, curves.T, color=light("ink"), linewidth=0.9, alpha=0.75)
    else:
        low, middle, high = np.nanpercentile(curves, [0, 50, 100], axis=0)
        axes.fill_between(ranks, low, high, color=light("ink"), alpha=0.2, linewidth=0)
        axes.plot(ranks, middle, color=light("ink"), linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.8, 1.05 * curves.shape[1] + 0.5)
    axes.set_xlabel("rank")
    axes.set_title(kind)
    bands = ", ".join(f"{rank} ranks at {bits} bits" for bits, rank in shown.bands)
    return Plot(
        f"spectrum-{name}-{kind}", kind, f"Singular values of {kind} over ranks, falling; bands: {bands}.", figure
    )


def _shade_bands(axes: Axes, spectrum: Spectrum) -> None:
    start = 0.0
    for bits, rank in spectrum.bands:
        left, right = max(start + 0.5, 0.8), start + rank + 0.5
        axes.axvspan(left, right, color=band_colour(bits), alpha=0.28, linewidth=0)
        middle = (left * right) ** 0.5
        axes.text(
            middle, 0.97, str(bits), transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9,
            fontweight="bold", color=band_colour(bits),
        )  # fmt: skip
        start += rank


def _padded(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Falling rows of different lengths as one matrix, filled up with NaN; zeros have no place on these axes."""
    positive = [row[row > 0] for row in rows]
    matrix = np.full((len(rows), max(len(row) for row in positive)), np.nan)
    for index, row in enumerate(positive):
        matrix[index, : len(row)] = row
    return matrix


def _point(axes: Axes, index: int, name: str, x: float, y: float, error: list[list[float]]) -> None:
    axes.errorbar(
        x, y, yerr=error, fmt=MARKERS[index % len(MARKERS)], color=series_colour(index), markersize=8,
        elinewidth=1.3, capsize=3, label=name,
    )  # fmt: skip


def _level(axes: Axes, name: str, value: float) -> None:
    axes.axhline(value, color=light("muted"), linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points", ha="right",
        va="bottom", color=light("muted"), fontsize=9,
    )  # fmt: skip


def _byte_axis(axes: Axes, *, logarithmic: bool) -> None:
    low, high = axes.get_xlim()
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if high >= unit or unit == 1
    )
    if logarithmic:
        # Equal byte counts are what is compared: leave room at both sides, or they would sit on the frame.
        axes.set_xlim(max(low, high / 1e6) / 1.6, high * 1.6) if low > 0 else axes.set_xlim(0, 1.15 * high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set_xlabel(f"bytes of the whole file, {name}")


def _told(deltas: Sequence[Candidate], quality: str, value: Callable[[Candidate], float | None]) -> str:
    parts = [
        f"{delta.name}: {delta.file_bytes} bytes, {quality} {found:.4g}"
        for delta in deltas
        if (found := value(delta)) is not None
    ]
    return "; ".join(parts) + "."


def _value(error: LayerError, measure: str) -> float | None:
    return error.weight if measure == "weight" else error.output
