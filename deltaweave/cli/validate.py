# SPDX-License-Identifier: Apache-2.0
"""`deltaweave validate`."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from deltaweave.cli.console import command_line, output, print_json, progress_bar
from deltaweave.formats import DeltaweaveError
from deltaweave.report import require_absent, write_validation
from deltaweave.validation import METRICS, Check, Validation, validate, write_junit

__all__ = ["EXAMPLES", "validate_command"]

EXAMPLES = """
Example: deltaweave validate math.safetensors --base B --tuned T --prompts prompts.jsonl --thresholds limits.yaml

Example: deltaweave validate math.safetensors --base B --tuned T --prompts prompts.jsonl --host arena --report v.html

Example: deltaweave validate math.safetensors --engine E --tuned T --prompts prompts.jsonl --thresholds limits.yaml
"""

_Reference = StrEnum("_Reference", {"float16": "float16", "float32": "float32"})
_Dtype = StrEnum("_Dtype", {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"})
_Host = StrEnum("_Host", {"attach": "attach", "arena": "arena"})


def validate_command(
    delta: Annotated[Path, typer.Argument(help="Delta file, or fusion file.")],
    tuned: Annotated[
        Path, typer.Option(help="Hugging Face folder of the fine-tune, the reference; of a fusion, the base's.")
    ],
    prompts: Annotated[Path, typer.Option(help="JSONL of prompt and, if wanted, answer.")],
    base: Annotated[Path | None, typer.Option(help="Hugging Face folder of the base, for PyTorch.")] = None,
    engine: Annotated[Path | None, typer.Option(help="TensorRT engine folder, instead of --base.")] = None,
    thresholds: Annotated[Path | None, typer.Option(help="YAML file of limits; exit status 1 if one breaks.")] = None,
    reference: Annotated[
        list[_Reference] | None,
        typer.Option(help="The fine-tune's dtype; may be repeated. [default: the thresholds' ones, or both]"),
    ] = None,
    dtype: Annotated[_Dtype | None, typer.Option(help="Of base + delta in PyTorch. [default: float16]")] = None,
    host: Annotated[
        _Host | None,
        typer.Option(help="In PyTorch: attach, the reference op (default); arena, libdeltaweave, as it is served."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of greedy decoding, at most.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts, at most. [default: all]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the fine-tune's chat template.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report with plots.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML; needs --thresholds.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: the GPU if there is one]")] = None,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take a base with other bytes (a cast).")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Check that base + delta still is the fine-tune, on prompts; exit status 1 if a threshold is broken."""
    if junit is not None and thresholds is None:
        raise typer.BadParameter("--junit needs --thresholds: its test cases are the limits")
    if (base is None) == (engine is None):
        raise typer.BadParameter("give --base, or --engine")
    if report is not None:
        require_absent(report, force=force)
    if junit is not None and junit.is_dir():
        raise DeltaweaveError(f"{junit}: is a folder")
    with progress_bar() as progress:
        validation = validate(
            delta,
            base=base,
            engine=engine,
            tuned=tuned,
            prompts=prompts,
            thresholds=thresholds,
            references=[one.value for one in reference] if reference else None,
            dtype=dtype.value if dtype else None,
            host=host.value if host else None,
            max_new_tokens=max_new_tokens,
            limit=limit,
            chat=chat,
            device=device,
            accept_base=accept_base,
            progress=progress,
        )
    if report is not None:
        write_validation(report, validation, command=command_line(), force=force)
    if junit is not None:
        write_junit(junit, validation)
    if json_output:
        print_json(validation.to_json())
    else:
        output.print(_table(validation))
        for check in validation.broken:
            output.print(f"[red]BROKEN[/]  {check}", soft_wrap=True)
    if not validation.passed:
        raise typer.Exit(1)


def _table(validation: Validation) -> Table:
    """One row a metric; two columns a reference."""
    title = Text(f"{validation.subject} against {validation.tuned}, {len(validation.prompts)} prompts")
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    checks = {(check.reference, check.metric): check for check in validation.checks}
    for reference in validation.measurements:
        table.add_column(f"against {reference}", justify="right")
        table.add_column("limit", justify="right")
    for name, metric in METRICS.items():
        cells = []
        for reference in validation.measurements:
            cells += [_value(metric.of(validation.measurements[reference])), _limit(checks.get((reference, name)))]
        table.add_row(metric.meaning, *cells)
    return table


def _value(value: float | None) -> str:
    if value is None:
        return "not seen"
    return "none" if math.isinf(value) else f"{value:.4g}"


def _limit(check: Check | None) -> str:
    if check is None:
        return ""
    return f"[{'green' if check.passed else 'red'}]{check.sign} {check.limit:g}[/]"
