# SPDX-License-Identifier: Apache-2.0
"""`deltaweave build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from deltaweave.cli.console import format_bytes, output, print_json, progress_bar, warn
from deltaweave.engines import CURRENT, EngineOptions, build_engine

__all__ = ["EXAMPLES", "build_command"]

SUFFIXES = {"": 1, "M": 1 << 20, "MIB": 1 << 20, "G": 1 << 30, "GIB": 1 << 30, "MB": 10**6, "GB": 10**9}
# TensorRT's reminders that say nothing about the graph.
NOISE = "Int64 binding"
EXAMPLES = """Examples:

    deltaweave build --base Llama-2-7b-hf -o llama.engine

    deltaweave build --base Qwen3-0.6B -o qwen.engine --compute-capability "8.0 8.9 12.0" --max-sequence 8192

    deltaweave build --base B -o b.engine --fusions --delta-experts 2

    deltaweave build --base B -o b.engine --max-batch 8 --max-tenants 16 --arena-bytes 4GiB
"""


def build_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Engine folder to write.")],
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPUs to build for: 8.0, 8.9, 12.0, ..., or current. Several by spaces, commas or again."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16. [default: float16 if the base is, else bfloat16]")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of a decode step.")] = 32,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a prefill step; longer prompts go in chunks.")
    ] = 2048,
    max_sequence: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its continuation.")] = 4096,
    max_tenants: Annotated[int, typer.Option(min=1, help="Fine-tunes on the GPU at a time.")] = 64,
    max_rank: Annotated[int | None, typer.Option(help="Largest rank. [default: what the base's shapes allow]")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Most tokens of a fine-tune. [default: base's + 256]")] = None,
    fusions: Annotated[
        bool, typer.Option("--fusions", help="Serve fusions of LoRAs too; costs every step nine launches a layer.")
    ] = False,
    delta_experts: Annotated[
        int, typer.Option(min=0, max=8, help="How many of a fusion's first experts may be deltas; with --fusions.")
    ] = 0,
    arena_bytes: Annotated[str, typer.Option(help="GPU memory for fine-tunes: 8GiB, 500MB, or bytes.")] = "8GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Build a TensorRT engine of a base, in which fine-tunes come and go without another build."""
    if dtype not in (None, "float16", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype}: expected float16 or bfloat16")
    words = " ".join(compute_capability or [CURRENT]).replace(",", " ").split()
    options = EngineOptions(
        capabilities=words,
        dtype=cast(Literal["float16", "bfloat16"] | None, dtype),
        max_batch=max_batch,
        max_tokens=max_tokens,
        max_sequence=max_sequence,
        max_tenants=max_tenants,
        max_rank=max_rank,
        vocabulary=vocabulary,
        fusions=fusions,
        delta_experts=delta_experts,
        arena_bytes=_bytes("--arena-bytes", arena_bytes),
    )
    with progress_bar() as report:
        manifest = build_engine(base, out, options, progress=report, write=_note)
    if as_json:
        print_json(manifest.model_dump())
        return
    graph = manifest.graph
    for capability, plan in manifest.plans.items():
        output.print(f"{out / plan.file}: {format_bytes(plan.bytes)} for compute capability {capability}")
    output.print(
        f"KV cache: {format_bytes(graph.cache_bytes(max_batch))} for {max_batch} rows of {graph.max_sequence} tokens, "
        f"{format_bytes(graph.cache_bytes(1))} each; arena: {format_bytes(manifest.capacities.arena_bytes)}"
    )


def _note(message: str) -> None:
    if NOISE not in message:
        warn(message)


def _bytes(option: str, text: str) -> int:
    number = text.rstrip("".join(sorted({*"".join(SUFFIXES), *"".join(SUFFIXES).lower()})))
    suffix = text[len(number) :].upper()
    if not number.isdecimal() or suffix not in SUFFIXES:
        raise typer.BadParameter(f"{option} {text!r}: expected a number of bytes, or one with MB, MiB, GB or GiB")
    return int(number) * SUFFIXES[suffix]
