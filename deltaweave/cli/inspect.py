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
from deltaweave.formats import Delta, Fusion, is_fusion, read_fusion
from deltaweave.inspection import RecordSummary, describe_gate, summarize, summarize_experts

__all__ = ["inspect_command", "print_totals", "totals"]


def inspect_command(
    delta: Annotated[Path, typer.Argument(help="Delta or fusion file.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a file holds: a delta's bands, bytes, ratios and errors per record; a fusion's experts and gate.

    Example: deltaweave inspect wizardmath.safetensors --json | jq .bytes
    """
    if is_fusion(delta):
        _inspect_fusion(delta, read_fusion(delta), json_output)
        return
    with Delta.open(delta) as opened:
        if json_output:
            records = [{**asdict(record), "bands": record.bands_text} for record in summarize(opened)]
            print_json({**totals(opened), "records": records})
            return
        output.print(_records_table(summarize(opened)))
        print_totals(opened)


def _inspect_fusion(path: Path, fusion: Fusion, json_output: bool) -> None:
    experts, gate = summarize_experts(fusion), describe_gate(fusion)
    if json_output:
        print_json(
            {
                "path": str(path),
                "base": {"name": fusion.base.name, "root": fusion.base.root},
                "method": dict(fusion.method),
                "training": None if fusion.training is None else dict(fusion.training),
                "experts": [asdict(expert) for expert in experts],
                "gate": gate,
            }
        )
        return
    table = Table("expert", "kind", "rank", "layers", "targets", "bytes", "file", box=box.SIMPLE_HEAD, pad_edge=False)
    for expert in experts:
        table.add_row(
            expert.name,
            expert.kind,
            ", ".join(map(str, expert.ranks or ())),
            "" if expert.modules is None else str(expert.modules),
            ", ".join(expert.targets or ()),
            format_bytes(expert.bytes) if expert.bytes else "",
            "" if expert.path is None else f"{expert.path} {(expert.header_sha256 or '')[:12]}".rstrip(),
        )
    output.print(table)
    output.print(
        f"{path.name}: {fusion.method['name']} over {fusion.base.name}, root {fusion.base.root[:12]}", markup=False
    )
    if gate["kind"] == "fixed":
        output.print("weights " + ", ".join(f"{weight:g}" for weight in gate["weights"]))
    else:
        output.print(
            f"gates of {gate['layers']} layers, hidden_size {gate['hidden_size']}, temperature {gate['temperature']:g}"
        )


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
