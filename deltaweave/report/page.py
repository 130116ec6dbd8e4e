# SPDX-License-Identifier: Apache-2.0
"""A comparison as one HTML file without outside resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from deltaweave.evaluation import Candidate, Comparison
from deltaweave.formats import DeltaweaveError
from deltaweave.formats.container import write_atomically, write_pieces
from deltaweave.report.details import DeltaDetails, read_details
from deltaweave.report.figures import Plot, byte_kinds, comparison_plots, delta_plots
from deltaweave.report.style import BITS, COLOURS, to_png, to_svg
from deltaweave.units import format_bytes, one_over, percent

__all__ = ["require_absent", "save_plots", "write_report"]

FOLDER = Path(__file__).parent


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
    page = _render(comparison, read_details(deltas), command).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda write: write_pieces(write, [page], []))
    return path


def require_absent(path: Path, *, force: bool) -> None:
    """Refuses a report that exists; to be asked before the work that leads to it.

    Raises:
        DeltaweaveError: it does, and `force` is not given.
    """
    if path.exists() and not force:
        raise DeltaweaveError(f"{path}: exists (--force replaces it)")


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


@dataclass(frozen=True)
class Drawing:
    """A plot as the page shows it."""

    kind: str
    title: str
    svg: Markup


def _all_plots(comparison: Comparison, details: Sequence[DeltaDetails]) -> Iterable[Plot]:
    yield from comparison_plots(comparison, details)
    for index, detail in enumerate(details, 1):
        yield from delta_plots(detail, index)


def _render(comparison: Comparison, details: Sequence[DeltaDetails], command: str | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": format_bytes, "one_over": one_over, "percent": percent}
    sections = [
        {"detail": detail, "index": index, "drawings": _drawings(delta_plots(detail, index))}
        for index, detail in enumerate(details, 1)
    ]
    return environment.get_template("page.html").render(
        comparison=comparison,
        rows=[_row(comparison, candidate) for candidate in comparison.candidates],
        headline=_headline(comparison, details),
        drawings=_drawings(comparison_plots(comparison, details)),
        sections=sections,
        byte_kinds=byte_kinds,
        command=command,
        colours=COLOURS,
        bits=BITS,
    )


def _drawings(plots: Iterable[Plot]) -> list[Drawing]:
    return [Drawing(plot.kind, plot.title, Markup(to_svg(plot.figure, plot.name, plot.description))) for plot in plots]


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
