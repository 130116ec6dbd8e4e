# SPDX-License-Identifier: Apache-2.0
"""What every command prints with: progress on the error stream, results on the output stream."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deltaweave.units import format_bytes

if TYPE_CHECKING:
    from deltaweave.converter import Progress as ProgressFunction

__all__ = ["command_line", "format_bytes", "output", "print_json", "progress_bar", "warn"]

# Without a terminal to fit into (a pipe, a log), a table takes the width it needs.
output = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
_errors = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(prefix: str = "") -> Iterator[ProgressFunction]:
    """A bar with the time left for each kind of work that is reported to it; `prefix` stands before each name."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=_errors)
    tasks: dict[str, Any] = {}
    try:

        def report(description: str, done: float, total: float) -> None:
            if description not in tasks:
                progress.start()
                for earlier in tasks.values():
                    progress.update(earlier, completed=progress.tasks[earlier].total)
                tasks[description] = progress.add_task(prefix + description, total=total)
            progress.update(tasks[description], completed=done, total=total)

        yield report
        for task in tasks.values():
            progress.update(task, completed=progress.tasks[task].total)
    finally:
        if tasks:
            progress.stop()


def print_json(value: Any) -> None:
    """Prints a value for machines."""
    print(json.dumps(value, indent=2))


def warn(message: str) -> None:
    """Tells a user something that is no error."""
    _errors.print(f"note: {message}", markup=False)


def command_line() -> str:
    """The command as it was typed, for model cards and reports."""
    return "deltaweave " + " ".join(shlex.quote(word) for word in sys.argv[1:])
