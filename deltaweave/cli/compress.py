# SPDX-License-Identifier: Apache-2.0
"""`deltaweave compress`."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from deltaweave.cli.console import (
    command_line,
    format_bytes,
    output,
    print_json,
    progress_bar,
    warn,
)
from deltaweave.cli.inspect import print_totals, totals
from deltaweave.converter import (
    BitDeltaOptions,
    CompressionOptions,
    CompressionPlan,
    EmbeddingPolicy,
    Estimate,
    Policies,
    Recipe,
    RecipeError,
    compress,
    compress_bitdelta,
    estimate,
    plan_compression,
)
from deltaweave.formats import Delta

__all__ = ["COMPRESS_EXAMPLES", "compress_command"]

BITDELTA = "bitdelta"
UNCALIBRATED = ("low-rank",)
COMPRESS_EXAMPLES = """Examples:

    deltaweave compress --base Llama-2-7b-hf --tuned WizardMath-7B -o wizardmath.safetensors

    deltaweave compress --base B --tuned T -o t.safetensors --bands 8:2,3:32,2:* --ratio 1/32 --calibration mine.jsonl

    deltaweave compress --base B --tuned T -o quick.safetensors --calibration none

    deltaweave compress --base B --tuned T -o t.safetensors --dry-run
"""


def compress_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    tuned: Annotated[Path, typer.Option(help="Hugging Face folder of the fine-tune.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Delta file to write (.safetensors).")],
    recipe: Annotated[
        str,
        typer.Option(help="triple (as published), optimal, double, single, low-rank, bitdelta, or a YAML file."),
    ] = "triple",
    bands: Annotated[
        str | None,
        typer.Option(help="Bands as BITS:RANK,...; the last rank may be * (what the ratio leaves) or full."),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(help="Budget of the projections as a share of 16 bit, metadata included. [default: 1/16]"),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Codes per scale and zero. [default: 128]")] = None,
    damping: Annotated[float | None, typer.Option(help="GPTQ damping. [default: 0.01]")] = None,
    calibration: Annotated[
        str,
        typer.Option(help="default, a .txt or .jsonl file, or none (round to nearest, the quick mode)."),
    ] = "default",
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 128,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens per sequence. [default: 2048, or the model's longest]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    embeddings: Annotated[
        EmbeddingPolicy, typer.Option(help="auto, exact, 8bit, or base (leave the base's).")
    ] = "auto",
    lm_head: Annotated[EmbeddingPolicy, typer.Option(help="The same for an untied lm_head.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: the GPU if there is one]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate time, memory, disk and size.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work of this output.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compress a fine-tune into a delta of its base.

    An interrupted run is resumed by the same command.
    """
    if threads:
        torch.set_num_threads(threads)
    policies = Policies(embeddings, lm_head)
    if recipe == BITDELTA:
        options = BitDeltaOptions(calibration=calibration, seed=seed, policies=policies)
        with progress_bar() as progress:
            compress_bitdelta(base, tuned, out, options, force=force, command=command_line(), progress=progress)
        _report(out, json_output)
        return
    chosen = _recipe(recipe, bands=bands, ratio=ratio, group_size=group_size, damping=damping)
    if chosen.name in UNCALIBRATED:
        calibration = "none"
    full_options = CompressionOptions(chosen, calibration, samples, sequence_length, seed, policies, device)
    plan = plan_compression(base, tuned, chosen)
    _tell_shrunk(plan)
    if dry_run:
        _print_estimate(estimate(plan, full_options), out, json_output)
        return
    with progress_bar() as progress:
        compress(
            base,
            tuned,
            out,
            full_options,
            force=force,
            restart=restart,
            command=command_line(),
            progress=progress,
        )
    _report(out, json_output)


def parse_ratio(text: str) -> float:
    """`1/16` or `0.0625`.

    Raises:
        RecipeError: anything else.
    """
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise RecipeError(f"--ratio {text}: expected a number such as 1/16 or 0.0625") from error


def _recipe(name: str, *, bands: str | None, ratio: str | None, **options: Any) -> Recipe:
    fields = {key: value for key, value in options.items() if value is not None}
    if ratio is not None:
        fields["ratio"] = parse_ratio(ratio)
    if bands is not None:
        return Recipe.checked({"name": "custom", "bands": bands, **fields}, "--bands")
    if name.endswith((".yaml", ".yml")):
        return Recipe.from_yaml(name, **fields)
    return Recipe.preset(name, **fields)


def _tell_shrunk(plan: CompressionPlan) -> None:
    if plan.shrunk:
        example = plan.shrunk[0]
        bands = ", ".join(f"{band.bits} bits x {band.rank}" for band in plan.bands[example.weight].bands)
        warn(
            f"{len(plan.shrunk)} projections are too small for the fixed bands at this ratio; their ranks shrink in "
            f"proportion ({example.weight}: {bands})"
        )


def _print_estimate(costs: Estimate, out: Path, json_output: bool) -> None:
    free = shutil.disk_usage(next(folder for folder in (out.absolute().parents) if folder.exists())).free
    if json_output:
        print_json({**asdict(costs), "free_disk_bytes": free})
        return
    table = Table("estimate", "", title=f"{out.name} (nothing was written)")
    table.add_row("time", f"{costs.seconds / 60:.1f} minutes")
    table.add_row("memory", format_bytes(costs.memory_bytes))
    table.add_row("disk, at its peak", f"{format_bytes(costs.disk_bytes)} of {format_bytes(free)} free")
    table.add_row("projections", format_bytes(costs.projection_bytes))
    table.add_row("file", format_bytes(costs.file_bytes))
    output.print(table)
    if costs.disk_bytes > free:
        warn(f"{out.parent}: too little space is free")


def _report(out: Path, json_output: bool) -> None:
    with Delta.open(out) as delta:
        if json_output:
            print_json(totals(delta))
        else:
            print_totals(delta)
