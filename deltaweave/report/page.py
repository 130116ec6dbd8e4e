# SPDX-License-Identifier: Apache-2.0
"""A comparison as one HTML file without outside resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deltaweave.evaluation import Candidate, Comparison
from deltaweave.report.details import DeltaDetails, read_details
from deltaweave.report.figures import Plot, byte_kinds, comparison_plots, delta_plots
from deltaweave.report.render import drawings, render, require_absent, write_page
from deltaweave.report.style import BITS, to_png
from deltaweave.units import format_bytes, one_over, percent

__all__ = ["save_plots", "write_report"]


def write_report(
    path: str | Path,
    comparison: Comparison,
    deltas: Sequence[str | Path],
    *,
    command: str | None = None,
    force: bool = False,
) -> Path:
    """Writes the report: whole, or not at all.

    Args:
        path: the HTML file.
        comparison: what was measured.
        deltas: the delta files of the comparison, in its order.
        command: what was typed to get it.
        force: replace an existing file.

    Raises:
        DeltaweaveError: the output exists or cannot be written.
        FormatError: a damaged delta.
    """
    path = Path(path)
    require_absent(path, force=force)
    write_page(path, _render(comparison, read_details(deltas), command))
    return path


def save_plots(folder: str | Path, comparison: Comparison, deltas: Sequence[str | Path]) -> list[Path]:
    """Writes every plot of the report as `NAME.png` into a folder; returns the files.

    Raises:
        FormatError: a damaged delta.
    """
    folder, details = Path(folder), read_details(deltas)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for plot in _all_plots(comparison, details):
        files.append(folder / f"{plot.name}.png")
        to_png(plot.figure, files[-1])
    return files


def _all_plots(comparison: Comparison, details: Sequence[DeltaDetails]) -> Iterable[Plot]:
    yield from comparison_plots(comparison, details)
    for index, detail in enumerate(details, 1):
        yield from delta_plots(detail, index)


def _render(comparison: Comparison, details: Sequence[DeltaDetails], command: str | None) -> str:
    sections = [
        {"detail": detail, "index": index, "drawings": drawings(delta_plots(detail, index))}
        for index, detail in enumerate(details, 1)
    ]
    return render(
        "page.html",
        comparison=comparison,
        rows=[_row(comparison, candidate) for candidate in comparison.candidates],
        headline=_headline(comparison, details),
        drawings=drawings(comparison_plots(comparison, details)),
        sections=sections,
        byte_kinds=byte_kinds,
        command=command,
        bits=BITS,
    )


def _row(comparison: Comparison, candidate: Candidate) -> dict[str, Any]:
    return {"candidate": candidate, "gain_kept": comparison.gain_kept(candidate)}


def _headline(comparison: Comparison, details: Sequence[DeltaDetails]) -> str:
    """The one sentence that a hurried reader takes home: the best delta, by what was measured."""
    deltas = comparison.candidates[2:]
    if not deltas:
        return ""
    best = max(deltas, key=_quality)
    told = f"{best.name} keeps the fine-tune in {format_bytes(best.file_bytes or 0)}"
    if best.file_ratio:
        told += f", {one_over(best.file_ratio)} of its bytes"
    kept = comparison.gain_kept(best)
    if kept is not None and best.task is not None:
        told += f", with {percent(kept)} of its gain over the base ({percent(best.task.accuracy)} of tasks solved)"
    elif best.text is not None:
        told += f", {best.text.kl:.4f} nats per token away from it"
    return told + "."


def _quality(candidate: Candidate) -> tuple[float, float]:
    task = candidate.task.accuracy if candidate.task is not None else 0.0
    return task, -candidate.text.kl if candidate.text is not None else 0.0
