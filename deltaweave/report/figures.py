# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: quality against bytes, bytes by kind, errors, spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from deltaweave.evaluation import Candidate, Comparison
from deltaweave.report.details import DeltaDetails, LayerError, Spectrum
from deltaweave.report.style import MARKERS, Axes, band_colour, light, new_figure, plot_style, series_colour

__all__ = ["Plot", "byte_kinds", "comparison_plots", "delta_plots"]

# Past this many layers their spectra are drawn as a range around the median.
FEW_LAYERS = 6
# Kinds of bytes, in the order in which they are drawn, and their colours.
BYTE_KINDS = {
    "codes": "series-1",
    "scales and zeros": "series-5",
    "sigma": "series-2",
    "padding": "rule",
    "norms, biases, embeddings": "series-3",
    "tokenizer and settings": "series-4",
    "header": "series-7",
}
MEASURES: dict[str, Callable[[LayerError], float | None]] = {
    "of the delta": lambda error: error.weight,
    "of the output on calibration data": lambda error: error.output,
}


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        kind: which of the plots it is.
        name: unique, fit for a file name.
        title: above it in the page.
        description: what it shows, in words, for those who do not see it.
        figure: the drawing.
    """

    kind: str
    name: str
    title: str
    description: str
    figure: Figure


def comparison_plots(comparison: Comparison, details: Sequence[DeltaDetails]) -> list[Plot]:
    """Plots over all deltas, for what was measured."""
    with plot_style():
        return [*_quality_plots(comparison), *_file_plots(details)]


def delta_plots(details: DeltaDetails, index: int) -> list[Plot]:
    """Plots of one delta, the index-th: spectra per kind of projection, errors per layer."""
    with plot_style():
        return [*_spectrum_plots(details, index), *_layer_plots(details, index)]


def byte_kinds(details: DeltaDetails) -> dict[str, int]:
    """Where a file's bytes go."""
    count = details.bytes
    parts = (count.codes, count.grids, count.sigma, count.padding, count.other, count.carried, count.header)
    return dict(zip(BYTE_KINDS, parts, strict=True))


def _quality_plots(comparison: Comparison) -> Iterator[Plot]:
    deltas = [delta for delta in comparison.candidates[2:] if delta.file_bytes]
    if any(delta.task for delta in deltas):
        yield _accuracy_plot(comparison, deltas)
    if any(delta.text for delta in deltas):
        yield _divergence_plot(deltas)


def _accuracy_plot(comparison: Comparison, deltas: Sequence[Candidate]) -> Plot:
    figure, (axes,) = new_figure(5.2, 3.4)
    told = []
    for index, delta in enumerate(deltas):
        if delta.task is not None:
            value, (low, high) = delta.task.accuracy, delta.task.interval
            _point(axes, index, delta, 100 * value, (100 * (value - low), 100 * (high - value)))
            told.append(f"{delta.name} {100 * value:.1f} % in {delta.file_bytes} bytes")
    for reference, below in zip(comparison.candidates[:2], (True, False), strict=True):
        if reference.task is not None:
            _level(axes, reference.name, 100 * reference.task.accuracy, below=below)
    _byte_axis(axes)
    axes.margins(y=0.12)
    axes.set_ylabel("accuracy, % (95 % interval)")
    figure.legend(loc="outside upper left", ncols=2)
    return Plot("quality", "accuracy", "Task accuracy against bytes", f"Task accuracy: {'; '.join(told)}.", figure)


def _divergence_plot(deltas: Sequence[Candidate]) -> Plot:
    figure, (axes,) = new_figure(5.2, 3.4)
    told, logarithmic = [], all(delta.text is None or delta.text.kl > 0 for delta in deltas)
    for index, delta in enumerate(deltas):
        if delta.text is not None:
            value, spread = delta.text.kl, 1.96 * delta.text.kl_error
            _point(axes, index, delta, value, (min(spread, 0.9 * value), spread))
            told.append(f"{delta.name} {value:.4g} in {delta.file_bytes} bytes")
    if logarithmic:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    _byte_axis(axes)
    axes.set_ylabel("KL to the fine-tune, nats per token")
    figure.legend(loc="outside upper left", ncols=2)
    description = f"KL from the fine-tune in nats per token: {'; '.join(told)}."
    return Plot("quality", "kl", "Distance to the fine-tune against bytes", description, figure)


def _file_plots(details: Sequence[DeltaDetails]) -> Iterator[Plot]:
    if details:
        yield _bytes_plot(details)
    for measure, value in MEASURES.items():
        if any(value(error) is not None for detail in details for error in detail.errors):
            yield _kind_plot(details, measure)


def _bytes_plot(details: Sequence[DeltaDetails]) -> Plot:
    figure, (axes,) = new_figure(10.6, 1.3 + 0.42 * len(details))
    left = np.zeros(len(details))
    for kind, colour in BYTE_KINDS.items():
        sizes = np.array([byte_kinds(detail)[kind] for detail in details], dtype=float)
        names = [detail.name for detail in details]
        axes.barh(names, sizes, left=left, height=0.6, color=light(colour), label=kind)
        left += sizes
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    _byte_axis(axes)
    figure.legend(loc="outside upper left", ncols=4)
    told = [
        f"{detail.name}: " + ", ".join(f"{kind} {size}" for kind, size in byte_kinds(detail).items())
        for detail in details
    ]
    return Plot("bytes", "bytes", "Bytes by kind", f"Bytes of each file by kind. {'; '.join(told)}.", figure)


def _kind_plot(details: Sequence[DeltaDetails], measure: str) -> Plot:
    kinds = list(dict.fromkeys(kind for detail in details for kind in detail.kinds))
    figure, (axes,) = new_figure(5.2, 1.5 + 0.34 * len(kinds))
    for index, detail in enumerate(details):
        shift = 0.56 * ((index + 0.5) / len(details) - 0.5)
        label: str | None = detail.name
        for row, kind in enumerate(kinds):
            values = [value for _, value in _errors(detail, kind, measure)]
            if values:
                _mean_and_range(axes, index, values, row + shift, label)
                label = None
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("relative error; mark: mean, line: range over layers")
    figure.legend(loc="outside upper left", ncols=2)
    description = f"Relative error {measure} for each kind of projection and each delta, mean and range over layers."
    return Plot("errors", f"error-{measure.split()[2]}", f"Relative error {measure}", description, figure)


def _layer_plots(details: DeltaDetails, index: int) -> Iterator[Plot]:
    measures = [
        measure for measure, value in MEASURES.items() if any(value(error) is not None for error in details.errors)
    ]
    if not measures:
        return
    figure, panels = new_figure(5.2 * len(measures), 3.4, columns=len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        for place, kind in enumerate(details.kinds):
            points = np.array(_errors(details, kind, measure)).reshape(-1, 2)
            axes.plot(
                points[:, 0], points[:, 1], marker=MARKERS[place % len(MARKERS)], markersize=4.5, linewidth=1.2,
                color=series_colour(place), label=kind if measure == measures[0] else None,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_title(measure)
    panels[0].set_ylabel("relative error")
    figure.legend(loc="outside upper left", ncols=7)
    description = f"Relative error of every projection of {details.name} over layers."
    yield Plot("layers", f"{index}-{details.name}-layers", "Relative error per layer", description, figure)


def _spectrum_plots(details: DeltaDetails, index: int) -> Iterator[Plot]:
    for kind in details.kinds:
        spectra = [spectrum for spectrum in details.spectra if spectrum.kind == kind and (spectrum.sigma > 0).any()]
        if spectra:
            yield _spectrum_plot(spectra, kind, f"{index}-{details.name}-{kind}")


def _spectrum_plot(spectra: Sequence[Spectrum], kind: str, name: str) -> Plot:
    figure, (axes,) = new_figure(2.9, 2.2)
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
    axes.set_xlim(0.8, curves.shape[1] + 0.5)
    # Room above the curves for the bands' bit widths.
    low, high = np.nanmin(curves), np.nanmax(curves)
    axes.set_ylim(low / (high / low) ** 0.05 / 1.05, high * (high / low) ** 0.25 * 1.3)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    axes.set_xlabel("rank")
    axes.set_title(kind)
    bands = ", ".join(f"{rank} ranks at {bits} bits" for bits, rank in shown.bands)
    description = f"Singular values of {kind} over ranks, falling; bands: {bands}."
    return Plot("spectrum", name, kind, description, figure)


def _shade_bands(axes: Axes, spectrum: Spectrum) -> None:
    start = 0
    for bits, rank in spectrum.bands:
        left, right = max(start + 0.5, 0.8), start + rank + 0.5
        axes.axvspan(left, right, color=band_colour(bits), alpha=0.28, linewidth=0)
        axes.text(
            (left * right) ** 0.5, 0.97, str(bits), transform=axes.get_xaxis_transform(), ha="center", va="top",
            fontsize=9, fontweight="bold", color=band_colour(bits),
        )  # fmt: skip
        start += rank


def _padded(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Falling rows of different lengths as one matrix, filled up with NaN; zeros have no place on these axes."""
    positive = [row[row > 0] for row in rows]
    matrix = np.full((len(rows), max(len(row) for row in positive)), np.nan)
    for index, row in enumerate(positive):
        matrix[index, : len(row)] = row
    return matrix


def _errors(details: DeltaDetails, kind: str, measure: str) -> list[tuple[int, float]]:
    """(layer, error) of a kind of projection, where one was recorded."""
    of = MEASURES[measure]
    return [(error.layer, value) for error in details.errors if error.kind == kind and (value := of(error)) is not None]


def _mean_and_range(axes: Axes, index: int, values: Sequence[float], y: float, label: str | None) -> None:
    colour, marker = series_colour(index), MARKERS[index % len(MARKERS)]
    axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.5, alpha=0.55)
    axes.plot(np.mean(values), y, marker, color=colour, markersize=5.5, linestyle="none", label=label)


def _point(axes: Axes, index: int, delta: Candidate, y: float, error: tuple[float, float]) -> None:
    axes.errorbar(
        delta.file_bytes, y, yerr=[[error[0]], [error[1]]], fmt=MARKERS[index % len(MARKERS)], markersize=8,
        color=series_colour(index), elinewidth=1.3, capsize=3, label=delta.name,
    )  # fmt: skip


def _level(axes: Axes, name: str, value: float, *, below: bool) -> None:
    """A reference as a dashed line across; its name stands above or below, so that equal ones stay legible."""
    axes.axhline(value, color=light("muted"), linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        name, (0, value), xycoords=("axes fraction", "data"), xytext=(5, -3 if below else 2),
        textcoords="offset points", ha="left", va="top" if below else "bottom", color=light("muted"), fontsize=9,
    )  # fmt: skip


def _byte_axis(axes: Axes) -> None:
    """Bytes from zero on, in a unit that suits them."""
    axes.autoscale_view()
    high = axes.get_xlim()[1]
    axes.set_xlim(0, high if axes.patches else 1.1 * high)
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if high >= unit)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set_xlabel(f"whole file, {name}")


def _plain_numbers(axis: Axes) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 if it spans little, without powers of ten."""
    low, high = axis.get_view_interval()
    narrow = high / low < 60
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
