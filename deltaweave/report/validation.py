# SPDX-License-Identifier: Apache-2.0
"""A validation as one HTML file without outside resources."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from deltaweave.report.figures import Plot
from deltaweave.report.render import drawings, render, require_absent, write_page
from deltaweave.report.style import MARKERS, Axes, light, new_figure, plot_style, series_colour
from deltaweave.validation import METRICS, Validation

__all__ = ["validation_plots", "write_validation"]

# Prompts whose texts the page shows: those that differ first.
SHOWN = 8


def write_validation(
    path: str | Path, validation: Validation, *, command: str | None = None, force: bool = False
) -> Path:
    """Writes the page: whole, or not at all.

    Args:
        path: the HTML file.
        validation: what was measured.
        command: what was typed to get it.
        force: replace an existing file.

    Raises:
        DeltaweaveError: the output exists or cannot be written.
    """
    path = Path(path)
    require_absent(path, force=force)
    page = render(
        "validation.html",
        validation=validation,
        metrics=METRICS,
        measured={reference: validation.metrics(reference) for reference in validation.measurements},
        checks={(check.reference, check.metric): check for check in validation.checks},
        drawings=drawings(validation_plots(validation)),
        texts=_texts(validation),
        show=_show,
        command=command,
    )
    write_page(path, page)
    return path


def validation_plots(validation: Validation) -> list[Plot]:
    """Errors over layers, KL of every prompt, and how far greedy texts agree."""
    with plot_style():
        return [*_layer_plots(validation), _divergence_plot(validation), _agreement_plot(validation)]


def _layer_plots(validation: Validation) -> Iterator[Plot]:
    measured = {name: found.layers for name, found in validation.measurements.items() if found.layers}
    if not measured:
        return
    figure, (axes,) = new_figure(5.2, 3.4)
    for index, (reference, errors) in enumerate(measured.items()):
        axes.plot(
            range(len(errors)), errors, marker=MARKERS[index], markersize=4.5, linewidth=1.2,
            color=series_colour(index), label=f"against {reference}",
        )  # fmt: skip
        _limit(axes, validation, reference, "layer_error", index)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of its output")
    figure.legend(loc="outside upper left", ncols=2)
    told = "; ".join(f"against {name} {errors[0]:.3g} to {errors[-1]:.3g}" for name, errors in measured.items())
    yield Plot("layers", "layers", "Error over layers", f"Relative error, first to last layer: {told}.", figure)


def _divergence_plot(validation: Validation) -> Plot:
    figure, (axes,) = new_figure(5.2, 3.4)
    told = []
    for index, (reference, found) in enumerate(validation.measurements.items()):
        values = np.sort([prompt.text.kl for prompt in found.prompts])
        axes.plot(
            np.arange(1, len(values) + 1), values, marker=MARKERS[index], markersize=4, linewidth=1,
            color=series_colour(index), label=f"against {reference}",
        )  # fmt: skip
        _limit(axes, validation, reference, "worst_kl", index)
        told.append(f"against {reference} {values[0]:.3g} to {values[-1]:.3g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompts, best to worst")
    axes.set_ylabel("KL to the fine-tune, nats per token")
    figure.legend(loc="outside upper left", ncols=2)
    return Plot("kl", "kl", "KL of every prompt", f"KL of the prompts in nats per token: {'; '.join(told)}.", figure)


def _agreement_plot(validation: Validation) -> Plot:
    """The share of greedy texts that still agree after so many tokens."""
    figure, (axes,) = new_figure(5.2, 3.4)
    longest = max(
        max(len(prompt.expected), len(prompt.found), 1)
        for found in validation.measurements.values()
        for prompt in found.prompts
    )
    tokens, told = np.arange(longest + 1), []
    for index, (reference, found) in enumerate(validation.measurements.items()):
        ends = [math.inf if prompt.divergence is None else prompt.divergence for prompt in found.prompts]
        shares = [100 * float(np.mean([end >= count for end in ends])) for count in tokens]
        axes.step(tokens, shares, where="post", linewidth=1.4, color=series_colour(index), label=f"against {reference}")
        told.append(f"against {reference} {shares[-1]:.0f} % to the last token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(0, 104)
    axes.set_xlabel("new tokens")
    axes.set_ylabel("prompts that agree so far, %")
    figure.legend(loc="outside upper left", ncols=2)
    return Plot("greedy", "greedy", "Agreement of greedy texts", f"Greedy texts that agree: {'; '.join(told)}.", figure)


def _limit(axes: Axes, validation: Validation, reference: str, metric: str, index: int) -> None:
    """The threshold as a dashed line, if there is one."""
    for check in validation.checks:
        if (check.reference, check.metric) == (reference, metric):
            axes.axhline(check.limit, color=series_colour(index), linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"limit, {reference}", (1, check.limit), xycoords=("axes fraction", "data"), xytext=(-4, 2),
                textcoords="offset points", ha="right", va="bottom", color=light("muted"), fontsize=9,
            )  # fmt: skip


def _texts(validation: Validation) -> list[tuple[str, str, str, int | None]]:
    """Prompt, expected, found and where they part, against the first reference; those that part first come first."""
    reference = next(iter(validation.measurements))
    scores = validation.measurements[reference].prompts
    rows = [
        (prompt.prompt, expected, found, score.divergence)
        for prompt, (expected, found), score in zip(
            validation.prompts, validation.texts[reference], scores, strict=True
        )
    ]
    return sorted(rows, key=lambda row: math.inf if row[3] is None else row[3])[:SHOWN]


def _show(value: float | None) -> str:
    if value is None:
        return "not seen"
    return "none" if math.isinf(value) else f"{value:.5g}"
