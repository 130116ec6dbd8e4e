# SPDX-License-Identifier: Apache-2.0
"""`deltaweave generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from deltaweave.engine_text import generate_with_engine
from deltaweave.generation import generate
from deltaweave.serving import Prompt, Text, generate_batch

__all__ = ["generate_command", "named_tenants"]


def generate_command(
    prompt: Annotated[list[str], typer.Option(help="Text to continue; with --tenant, NAME=TEXT, any number of times.")],
    delta: Annotated[Path | None, typer.Argument(help="Delta or fusion file, for one text.")] = None,
    base: Annotated[Path | None, typer.Option(help="Hugging Face folder of the base.")] = None,
    engine: Annotated[
        Path | None,
        typer.Option(help="Engine folder that `deltaweave build` wrote, in the base's place; with --tenant."),
    ] = None,
    tenant: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, a delta or fusion to serve beside others; once for each.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy. [default: the fine-tune's own settings]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the fine-tune's chat template.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: the GPU if there is one]")] = None,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take a base with other bytes (a cast).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the texts as JSON, once all are there.")] = False,
) -> None:
    """Write text with base + delta, as it comes; or with several deltas and fusions, in one batch.

    Example: deltaweave generate wizardmath.safetensors --base Llama-2-7b-hf --chat --prompt "What is 17 * 23?"

    Example: deltaweave generate --engine llama.engine --tenant math=wizardmath.safetensors --prompt "math=17 * 23 ="

    Example: deltaweave generate --base Llama-2-7b-hf --tenant math=wizardmath.safetensors --tenant code=c.safetensors
    --prompt "math=What is 17 * 23?" --prompt "code=def primes(n):" --prompt "base=Once upon a time"
    """
    if (base is None) == (engine is None):
        raise typer.BadParameter("give --base or --engine")
    if engine is not None:
        if delta is not None:
            raise typer.BadParameter("--engine takes fine-tunes as --tenant NAME=FILE")
        tenants = named_tenants(tenant)
        texts = generate_with_engine(
            engine,
            tenants,
            [_prompt(text, tenants, temperature, seed) for text in prompt],
            max_new_tokens=max_new_tokens,
            chat=chat,
            accept_base=accept_base,
        )
        _print_texts(texts, as_json)
        return
    assert base is not None
    if (delta is None) == (not tenant):
        raise typer.BadParameter("give a delta file, or --tenant NAME=FILE for each of several")
    if delta is None:
        tenants = named_tenants(tenant)
        texts = generate_batch(
            base,
            tenants,
            [_prompt(text, tenants, temperature, seed) for text in prompt],
            max_new_tokens=max_new_tokens,
            chat=chat,
            device=device,
            accept_base=accept_base,
        )
        _print_texts(texts, as_json)
        return
    if len(prompt) != 1:
        raise typer.BadParameter(f"{len(prompt)} times --prompt; one delta file takes one, --tenant takes any number")
    text = generate(
        base,
        delta,
        prompt[0],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        device=device,
        accept_base=accept_base,
        write=None if as_json else _write,
    )
    _write(json.dumps({"prompt": prompt[0], "text": text}, ensure_ascii=False) + "\n" if as_json else "\n")


def named_tenants(options: Sequence[str] | None) -> dict[str, str]:
    """Files by name, from NAME=FILE options.

    Raises:
        typer.BadParameter: an option of another form, or a name given twice.
    """
    tenants: dict[str, str] = {}
    for text in options or []:
        name, file = _named("--tenant", text)
        if name in tenants:
            raise typer.BadParameter(f"--tenant {text!r}: {name!r} is {tenants[name]} already")
        tenants[name] = file
    return tenants


def _prompt(text: str, tenants: dict[str, str], temperature: float | None, seed: int) -> Prompt:
    """`base=` means the bare base, unless a tenant is called so."""
    name, content = _named("--prompt", text)
    if name not in tenants and name != "base":
        raise typer.BadParameter(f"--prompt {text!r}: no --tenant {name!r}; begin it with NAME= or base=")
    return Prompt(content, name if name in tenants else None, temperature=temperature, seed=seed)


def _named(option: str, text: str) -> tuple[str, str]:
    name, equals, content = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{option} {text!r}: expected NAME=...")
    return name, content


def _print_texts(texts: Sequence[Text], as_json: bool) -> None:
    if as_json:
        _write(json.dumps([dataclasses.asdict(text) for text in texts], ensure_ascii=False, indent=2) + "\n")
        return
    for text in texts:
        _write(f"[{text.tenant or 'base'}] {text.prompt}\n{text.text}\n\n")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
