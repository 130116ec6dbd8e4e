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
    DEFAULT_RECIPE,
    PRESETS,
    ROUNDS,
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

__all__ = ["EXAMPLES", "compress_command"]

BITDELTA = "bitdelta"
UNCALIBRATED = ("low-rank",)
EXAMPLES = """Examples:

    deltaweave compress --base Llama-2-7b-hf --tuned WizardMath-7B -o wizardmath.safetensors

    deltaweave compress --base B --tuned T -o t.safetensors --bands 8:2,3:32,2:* --ratio 1/32 --calibration mine.jsonl

    deltaweave compress --base B --tuned T -o quick.safetensors --calibration none

    deltaweave compress --base B --tuned T -o t.safetensors --max-bytes 900MB

    deltaweave compress --base B --tuned T -o t.safetensors --max-kl 0.002 --held-out mine.txt

    deltaweave compress --base B --tuned T -o t.safetensors --dry-run
"""


def compress_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    tuned: Annotated[Path, typer.Option(help="Hugging Face folder of the fine-tune.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Delta file to write (.safetensors).")],
    recipe: Annotated[
        str,
        typer.Option(
            help="optimal, triple (as published), corrected, double, single, low-rank, bitdelta, or a YAML file."
        ),
    ] = DEFAULT_RECIPE,
    bands: Annotated[
        str | None,
        typer.Option(help="Bands as BITS:RANK,...; the last rank may be * (what the ratio leaves) or full."),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(help="Budget of the projections as a share of 16 bit, metadata included. [default: 1/16]"),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="The same budget in bytes, such as 900MB or 1.5GiB: of the projections, metadata included; norms, "
            "embeddings and carried files come on top."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Look for the smallest file whose KL to the fine-tune, measured in nats a token on held-out text, is "
            "at most this; compresses a few times."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Text (.txt, .jsonl) that --max-kl measures on. [default: an eighth of the calibration text, which is "
            "then not calibrated on]"
        ),
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
        _refuse_budget(ratio=ratio, max_bytes=max_bytes, max_kl=max_kl, held_out=held_out)
        options = BitDeltaOptions(calibration=calibration, seed=seed, policies=policies)
        with progress_bar() as progress:
            compress_bitdelta(base, tuned, out, options, force=force, command=command_line(), progress=progress)
        _report(out, json_output)
        return
    budget = {"ratio": None if ratio is None else parse_ratio(ratio), "max_bytes": max_bytes, "max_kl": max_kl}
    chosen = _recipe(recipe, bands, {**budget, "group_size": group_size, "damping": damping})
    if chosen.name in UNCALIBRATED:
        calibration = "none"
    full_options = CompressionOptions(chosen, calibration, samples, sequence_length, seed, policies, device, held_out)
    plan = plan_compression(base, tuned, chosen)
    if chosen.max_kl is None:
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


def _recipe(name: str, bands: str | None, options: dict[str, Any]) -> Recipe:
    """The recipe of a name, a YAML file or a band list, with what the command line says of its fields."""
    fields = {key: value for key, value in options.items() if value is not None}
    if bands is not None:
        return Recipe.checked({"name": "custom", "bands": bands, **fields}, "--bands")
    if name.endswith((".yaml", ".yml")):
        return Recipe.from_yaml(name, **fields)
    if name not in PRESETS:
        raise RecipeError(f"--recipe {name}: expected one of {', '.join([*PRESETS, BITDELTA])} or a YAML file")
    return Recipe.preset(name, **fields)


def _refuse_budget(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"--{name.replace('_', '-')} {value}: bitdelta has one size, one bit a weight")


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
    tries = f", {costs.tries} tries assumed; at most {ROUNDS}" if costs.tries > 1 else ""
    table.add_row("time", f"{costs.seconds / 60:.1f} minutes{tries}")
    table.add_row("memory", format_bytes(costs.memory_bytes))
    table.add_row("disk, at its peak", f"{format_bytes(costs.disk_bytes)} of {format_bytes(free)} free")
    found = " where the search begins" if costs.tries > 1 else ""
    table.add_row("projections", format_bytes(costs.projection_bytes) + found)
    table.add_row("file", format_bytes(costs.file_bytes) + found)
    output.print(table)
    if costs.disk_bytes > free:
        warn(f"{out.parent}: too little space is free")


def _report(out: Path, json_output: bool) -> None:
    with Delta.open(out) as delta:
        if json_output:
            print_json(totals(delta))
        else:
            print_totals(delta)
            if "quality" in delta.header.method:
                _print_quality(delta.header.method["quality"])


def _print_quality(quality: dict[str, Any]) -> None:
    """What was wanted, predicted and measured, try by try."""
    limit = quality["max_kl"]
    table = Table("ratio", "projections", "KL predicted", "KL measured", "", box=None)
    for column in table.columns:
        column.justify = "right"
    for attempt in quality["attempts"]:
        predicted, kept = attempt["predicted"], attempt == quality["chosen"]
        table.add_row(
            f"1/{1 / attempt['ratio']:.2f}",
            format_bytes(attempt["bytes"]),
            "" if predicted is None else f"{predicted:.3g}",
            f"{attempt['kl']:.3g} +- {attempt['error']:.1g}",
            "written" if kept else "over" if attempt["kl"] > limit else "larger",
        )
    output.print(
        f"KL wanted: at most {limit:g} nats a token, on {quality['tokens']} held-out tokens of {quality['text']}"
    )
    output.print(table)
