# SPDX-License-Identifier: Apache-2.0
"""The model card beside a delta: what it is, of what, under which licence, and the exact command that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaweave.formats import Delta
from deltaweave.formats.container import write_atomically, write_pieces

__all__ = ["card_path", "write_card"]

TEMPLATE = """\
---
base_model: {base}
license: {license}
tags: [deltaweave, delta-compression]
---

# {title}

A {method} delta of **{tuned}** over **{base}**, made by {tool}. Base + delta is the fine-tune.

| | |
|---|---|
| base | {base}, revision {base_revision}, licence {base_license}, root SHA-256 `{root}` |
| fine-tune | {tuned}, revision {tuned_revision}, licence {tuned_license}, {tuned_bytes:,} bytes |
| this file | {file_bytes:,} bytes, {file_ratio} of the fine-tune |
| its projections | {projection_bytes:,} bytes, {projection_ratio} of their 16-bit bytes |
| calibration | {calibration} |
| recipe | {recipe} |
| quality | {quality} |

## How it was made

```
{command}
```

## How to use it

```
deltaweave verify {file} --base BASE
deltaweave generate {file} --base BASE --prompt "..."
deltaweave apply {file} --base BASE --output DENSE
```
"""


def card_path(delta: Path) -> Path:
    """Where the card of a delta lies: `NAME.md` beside `NAME.safetensors`."""
    return delta.with_suffix(".md")


def write_card(path: Path, command: str | None) -> None:
    """Writes the card of the delta at `path` from its header.

    Raises:
        DeltaweaveError: it cannot be written, on a full disk say; an older card is left as it was.
    """
    with Delta.open(path) as delta:
        header, count = delta.header, delta.byte_count()
        text = TEMPLATE.format(
            title=path.stem,
            file=path.name,
            tool=header.tool,
            method=header.method["name"],
            base=header.base.name,
            base_revision=header.base.revision or "not stated",
            base_license=header.base.license or "not stated",
            root=header.base.root,
            tuned=header.tuned.name,
            tuned_revision=header.tuned.revision or "not stated",
            tuned_license=header.tuned.license or "not stated",
            license=header.tuned.license or "unknown",
            tuned_bytes=header.tuned.bytes,
            file_bytes=count.file,
            file_ratio=ratio_text(count.file, header.tuned.bytes),
            projection_bytes=count.projections,
            projection_ratio=ratio_text(count.projections, count.tuned_projections),
            calibration=_calibration_text(header.calibration),
            recipe=_recipe_text(header.method.get("recipe", {})),
            quality=_quality_text(header.method.get("quality")),
            command=command or "deltaweave.compress(...) from Python",
        )
    write_atomically(card_path(path), lambda write: write_pieces(write, [text.encode()], []))


def ratio_text(part: int, whole: int) -> str:
    """A ratio as 1/N."""
    return f"1/{whole / part:.2f}" if part else "0"


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in recipe.items() if value not in ({}, None))


def _quality_text(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return "not measured when it was made (`deltaweave compare` does)"
    chosen = quality["chosen"]
    return (
        f"KL to the fine-tune {chosen['kl']:.3g} +- {chosen['error']:.1g} nats a token, at most {quality['max_kl']:g} "
        f"wanted, on {quality['tokens']} held-out tokens of {quality['text']}"
    )


def _calibration_text(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "none (round to nearest)"
    return "{samples} sequences of {sequence_length} tokens from {source}, SHA-256 `{sha256}`".format(**calibration)
