# SPDX-License-Identifier: Apache-2.0
"""`deltaweave bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deltaweave.cli.console import output, print_json
from deltaweave.cli.generate import named_tenants
from deltaweave.engine_bench import bench_engine

__all__ = ["bench_command"]


def bench_command(
    engine: Annotated[Path, typer.Option(help="Engine folder that `deltaweave build` wrote.")],
    tenant: Annotated[list[str] | None, typer.Option(help="NAME=FILE, a fine-tune; once for each.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at a time; again for others. [default: 1 8]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 64,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take deltas of another base.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure an engine: time to first token, time between tokens, tokens a second.

    Example: deltaweave bench --engine llama.engine --tenant math=m.safetensors --tenant code=c.safetensors --batch 8
    """
    found = bench_engine(
        engine,
        named_tenants(tenant),
        batches=batch or [1, 8],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        accept_base=accept_base,
    )
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
        return
    table = Table("batch", "fine-tunes", "first token", "between tokens: 50 %", "90 %", "99 %", "tokens/s")
    for each in found:
        times = [f"{value:.2f} ms" for value in (each.first_token_ms, *each.token_ms.values())]
        table.add_row(str(each.batch), str(each.tenants or "base"), *times, f"{each.tokens_per_second:.0f}")
    output.print(table)
