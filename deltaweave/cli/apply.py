# SPDX-License-Identifier: Apache-2.0
"""`deltaweave apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaweave.cli.console import output, progress_bar
from deltaweave.converter import apply

__all__ = ["apply_command"]


def apply_command(
    delta: Annotated[Path, typer.Argument(help="Delta file.")],
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take a base with other bytes (a cast).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """Write base + delta as a dense Hugging Face checkpoint.

    Example: deltaweave apply wizardmath.safetensors --base Llama-2-7b-hf -o wizardmath-dense
    """
    with progress_bar() as progress:
        apply(base, delta, out, accept_base=accept_base, force=force, progress=progress)
    output.print(f"wrote {out}", markup=False)
