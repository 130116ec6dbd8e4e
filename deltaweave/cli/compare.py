# SPDX-License-Identifier: Apache-2.0
"""`deltaweave compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaweave.cli.console import command_line, output, print_json, progress_bar
from deltaweave.cli.tables import comparison_table, samples_table
from deltaweave.evaluation import compare
from deltaweave.report import require_absent, save_plots, write_report

__all__ = ["compare_command"]


def compare_command(
    deltas: Annotated[list[Path], typer.Argument(help="Delta files.")],
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    tuned: Annotated[Path, typer.Option(help="Hugging Face folder of the fine-tune.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text for perplexity and KL.")] = None,
    tasks: Annotated[Path | None, typer.Option(help="JSONL of prompt and answer, scored by exact match.")] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence of the text.")] = 256,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the text, at most.")] = 64,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Tasks, at most. [default: all]")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report with plots.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write the report's plots as PNG files into this folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: the GPU if there is one]")] = None,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take a base with other bytes (a cast).")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Compare deltas with their fine-tune: bytes, task accuracy, perplexity, KL.

    Example: deltaweave compare a.safetensors b.safetensors --base B --tuned T --text held-out.txt --tasks gsm.jsonl
    """
    if report is not None:
        require_absent(report, force=force)
    with progress_bar() as progress:
        comparison = compare(
            base,
            tuned,
            deltas,
            text=text,
            tasks=tasks,
            sequence_length=sequence_length,
            sequences=sequences,
            task_limit=task_limit,
            device=device,
            accept_base=accept_base,
            progress=progress,
        )
    if report is not None:
        write_report(report, comparison, deltas, command=command_line(), force=force)
    if plots is not None:
        save_plots(plots, comparison, deltas)
    if json_output:
        print_json(comparison.to_json())
        return
    output.print(comparison_table(comparison))
    if comparison.prompts:
        output.print(samples_table(comparison))
