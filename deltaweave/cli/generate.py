# SPDX-License-Identifier: Apache-2.0
"""`deltaweave generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deltaweave.generation import generate

__all__ = ["generate_command"]


def generate_command(
    delta: Annotated[Path, typer.Argument(help="Delta file.")],
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy. [default: the fine-tune's own settings]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the fine-tune's chat template.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: the GPU if there is one]")] = None,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take a base with other bytes (a cast).")] = False,
) -> None:
    """Write text with base + delta, as it comes.

    Example: deltaweave generate wizardmath.safetensors --base Llama-2-7b-hf --chat --prompt "What is 17 * 23?"
    """

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    generate(
        base,
        delta,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        device=device,
        accept_base=accept_base,
        write=write,
    )
    write("\n")
