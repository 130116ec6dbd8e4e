# SPDX-License-Identifier: Apache-2.0
"""`deltaweave inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from deltaweave.cli.console import format_bytes, output, print_json
from deltaweave.formats import Delta
from deltaweave.inspection import RecordSummary, summarize

__all__ = ["inspect_command", "print_totals", "totals"]


def inspect_command(
    delta: Annotated[Path, typer.Argument(help="Delta file.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a delta holds: bands, bytes, ratios and errors per record, then the whole file.

    Example: deltaweave inspect wizardmath.safetensors --json | jq .bytes
    """
    with Delta.open(delta) as opened:
        if json_output:
            records = [{**asdict(record), "bands": record.bands_text} for record in summarize(opened)]
            print_json({**totals(opened), "records": records})
            return
        output.print(_records_table(summarize(opened)))
        print_totals(opened)


def totals(delta: Delta) -> dict[str, Any]:
    """The whole file's numbers, for machines."""
    count, header = delta.byte_count(), delta.header
    return {
        "path": str(delta.path),
        "base": {"name": header.base.name, "root": header.base.root},
        "tuned": {"name": header.tuned.name, "bytes": header.tuned.bytes},
        "method": header.method,
        "calibration": header.calibration,
        "bytes": asdict(count),
        "projection_ratio": _ratio(count.projections, count.tuned_projections),
        "file_ratio": _ratio(count.file, header.tuned.bytes),
        "alpha": _mean_alpha(summarize(delta)),
        "files": sorted(header.files),
    }


def print_totals(delta: Delta) -> None:
    """The whole file's numbers, for people."""
    count, header = delta.byte_count(), delta.header
    output.print(
        f"{delta.path.name}: {header.method['name']} delta of {header.tuned.name} over {header.base.name}",
        markup=False,
    )
    table = Table("bytes", "stored", "of the fine-tune's", box=None)
    table.add_row(
        "projections",
        format_bytes(count.projections),
        _one_over(count.projections, count.tuned_projections),
    )
    table.add_row("whole file", format_bytes(count.file), _one_over(count.file, header.tuned.bytes))
    output.print(table)
    alpha = _mean_alpha(summarize(delta))
    if alpha is not None:
        output.print(f"alpha as published (codes alone): {alpha:.4f} = 1/{1 / alpha:.1f}")


def _records_table(records: list[RecordSummary]) -> Table:
    table = Table("record", "shape", "bits:rank", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("bytes", "ratio", "alpha", "weight error", "output error"):
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(
            record.name.removeprefix("model.").removesuffix(".weight"),
            "x".join(map(str, record.shape)),
            record.bands_text if record.kind == "factored" else _kind_text(record),
            format_bytes(record.bytes),
            f"{record.ratio:.4f}",
            _number(record.alpha, 4),
            _number(record.weight_error, 3),
            _number(record.output_error, 3),
        )
    return table


def _kind_text(record: RecordSummary) -> str:
    words = {"dense": "dense", "rows": "exact rows", "replace": "exact", "base": "as in the base"}
    return f"{words[record.kind]} {record.bands[0][0]} bit" if record.bands else words[record.kind]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean_alpha(records: list[RecordSummary]) -> float | None:
    """Alpha over all factored records, weighted by their sizes."""
    factored = [(record.alpha, record.shape[0] * record.shape[1]) for record in records if record.alpha is not None]
    weight = sum(numbers for _, numbers in factored)
    return sum(alpha * numbers for alpha, numbers in factored) / weight if weight else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _one_over(part: int, whole: int) -> str:
    return f"1/{whole / part:.2f}" if part and whole else "-"
