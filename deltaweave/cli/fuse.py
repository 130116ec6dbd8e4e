# SPDX-License-Identifier: Apache-2.0
"""`deltaweave fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaweave.cli.console import output as console
from deltaweave.cli.console import print_json, progress_bar
from deltaweave.formats.fusion import FixedGate
from deltaweave.gates.build import Parts
from deltaweave.gates.fuse import fuse

__all__ = ["fuse_command"]


def fuse_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Fusion file to write, NAME.safetensors.")],
    lora: Annotated[
        list[Path] | None, typer.Option(help="PEFT folder, or fusion file of one LoRA; once for each.")
    ] = None,
    delta: Annotated[
        list[Path] | None, typer.Option(help="Delta file beside the output; once for each, behind the LoRAs.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number an expert, such as 0.7,0.3. [default: the average]")
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="File of LoRA-Flow's released gates, in place of weights.")] = None,
    temperature: Annotated[float, typer.Option(help="Of those gates' softmax; their files hold none.")] = 1.0,
    reference: Annotated[
        bool, typer.Option("--reference/--inline", help="Name LoRA files beside the output, or copy LoRAs into it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put LoRAs and deltas of one base into a fusion file, with weights of your choice or a released gate.

    Gates are trained by `deltaweave gate train`.

    Example: deltaweave fuse --base Llama-2-7b-hf --lora german --lora math --weights 0.7,0.3 -o fusion.safetensors
    """
    experts = [*(lora or []), *(delta or [])]
    if not experts:
        raise typer.BadParameter("give at least one --lora or --delta")
    numbers = None if weights is None else _numbers(weights)
    with progress_bar() as progress:
        parts = Parts.open(base, experts, output, reference=reference, force=force, progress=progress)
        chosen = fuse(parts, weights=numbers, gate=gate, temperature=temperature, force=force)
    names = [expert.lora.name for expert in parts.experts]
    fixed = list(chosen.weights) if isinstance(chosen, FixedGate) else None
    if json_output:
        print_json({"path": str(output), "experts": names, "weights": fixed})
        return
    how = "a gate a layer" if fixed is None else "weights " + ", ".join(f"{weight:g}" for weight in fixed)
    console.print(f"{output}: {', '.join(names)}, {how}", markup=False)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights {text!r}: expected numbers such as 0.7,0.3") from error
