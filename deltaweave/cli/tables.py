# SPDX-License-Identifier: Apache-2.0
"""Tables that more than one command prints."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from deltaweave.cli.console import format_bytes
from deltaweave.evaluation import Candidate, Comparison

__all__ = ["comparison_table", "samples_table"]


def comparison_table(comparison: Comparison) -> Table:
    """One row a candidate; columns for what was measured."""
    scored_text = any(candidate.text for candidate in comparison.candidates)
    scored_task = any(candidate.task for candidate in comparison.candidates)
    table = Table(title=f"{comparison.tuned} over {comparison.base}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = ["projections\n(of 16 bit)", "all bytes\n(of fine-tune)"]
    columns += ["accuracy\n(95 % interval)", "gain\nkept"] if scored_task else []
    columns += ["perplexity", "KL to\nfine-tune", "same\ntop token"] if scored_text else []
    for column in columns:
        table.add_column(column, justify="right")
    for candidate in comparison.candidates:
        cells = _size_cells(candidate)
        cells += _task_cells(comparison, candidate) if scored_task else []
        cells += _text_cells(candidate) if scored_text else []
        table.add_row(candidate.name, *cells)
    return table


def samples_table(comparison: Comparison) -> Table:
    """What each candidate answers, side by side."""
    table = Table(title="the same prompts, answered greedily", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("prompt")
    table.add_column("expected")
    for candidate in comparison.candidates:
        table.add_column(candidate.name)
    for index, task in enumerate(comparison.prompts):
        answers = [Text(candidate.samples[index].strip()) for candidate in comparison.candidates]
        table.add_row(Text(task.prompt.strip()), Text(task.answer.strip()), *answers)
    return table


def _size_cells(candidate: Candidate) -> list[str]:
    return [
        _bytes_cell(candidate.projection_bytes, candidate.projection_ratio),
        _bytes_cell(candidate.file_bytes, candidate.file_ratio),
    ]


def _bytes_cell(count: int | None, ratio: float | None) -> str:
    if count is None:
        return ""
    return format_bytes(count) + ("" if not ratio or ratio == 1 else f" (1/{1 / ratio:.1f})")


def _task_cells(comparison: Comparison, candidate: Candidate) -> list[str]:
    if candidate.task is None:
        return ["", ""]
    low, high = candidate.task.interval
    kept = comparison.gain_kept(candidate)
    share = f"{100 * candidate.task.accuracy:.1f} % ({100 * low:.0f}-{100 * high:.0f})"
    return [share, "" if kept is None else f"{100 * kept:.1f} %"]


def _text_cells(candidate: Candidate) -> list[str]:
    if candidate.text is None:
        return ["", "", ""]
    text = candidate.text
    return [f"{text.perplexity:.3f}", f"{text.kl:.4f} ±{text.kl_error:.4f}", f"{100 * text.top1:.1f} %"]
