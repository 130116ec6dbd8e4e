# SPDX-License-Identifier: Apache-2.0
"""What all pages share: templates, drawings, and how a page is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from deltaweave.formats import DeltaweaveError
from deltaweave.formats.container import write_atomically, write_pieces
from deltaweave.report.figures import Plot
from deltaweave.report.style import COLOURS, to_svg
from deltaweave.units import format_bytes, one_over, percent

__all__ = ["Drawing", "drawings", "render", "require_absent", "write_page"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Drawing:
    """A plot as the page shows it."""

    kind: str
    title: str
    svg: Markup


def drawings(plots: Iterable[Plot]) -> list[Drawing]:
    """Plots made ready for a page."""
    return [Drawing(plot.kind, plot.title, Markup(to_svg(plot.figure, plot.name, plot.description))) for plot in plots]


def render(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file; a value that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": format_bytes, "one_over": one_over, "percent": percent}
    return environment.get_template(template).render(colours=COLOURS, **values)


def require_absent(path: Path, *, force: bool) -> None:
    """Refuses a report that exists; to be asked before the work that leads to it.

    Raises:
        DeltaweaveError: it does, and `force` is not given.
    """
    if path.exists() and not force:
        raise DeltaweaveError(f"{path}: exists (--force replaces it)")


def write_page(path: Path, page: str) -> None:
    """Writes a page: whole, or not at all.

    Raises:
        DeltaweaveError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda write: write_pieces(write, [page.encode()], []))
