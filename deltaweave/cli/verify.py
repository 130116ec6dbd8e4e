# SPDX-License-Identifier: Apache-2.0
"""`deltaweave verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deltaweave.cli.console import output, print_json, progress_bar
from deltaweave.converter import verify

__all__ = ["verify_command"]


def verify_command(
    delta: Annotated[Path, typer.Argument(help="Delta or fusion file.")],
    base: Annotated[Path | None, typer.Option(help="Compare every tensor's digest of this base.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Compare base + delta with this fine-tune.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check a file's integrity, its base, and a delta's errors or a fusion's experts; exit status 1 if a check fails.

    Example: deltaweave verify wizardmath.safetensors --base Llama-2-7b-hf --tuned WizardMath-7B
    """
    if tuned is not None and base is None:
        raise typer.BadParameter("--tuned needs --base")
    with progress_bar() as progress:
        checks = list(verify(delta, base, tuned, progress))
    if json_output:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            mark = "[green]passed[/]" if check.passed else "[red]FAILED[/]"
            output.print(f"{mark}  {check.name}:", end=" ")
            output.print(check.detail, markup=False, soft_wrap=True)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
