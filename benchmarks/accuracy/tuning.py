# SPDX-License-Identifier: Apache-2.0
"""The fine-tunes: what each is trained on, how long, and what its delta looks like."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter import Checkpoint
from deltaweave.converter.plan import open_pair
from deltaweave.converter.svd import truncated_svd
from finetune import encode, train, train_as_graph
from problems import SKILLS

from deltaweave.gates.examples import Example
from deltaweave.models import load_checkpoint

__all__ = ["TUNINGS", "Tuning", "spectrum", "tune", "write_calibration"]


@dataclass(frozen=True)
class Tuning:
    """A fine-tune of all weights but the embeddings.

    Attributes:
        skill: of `problems.SKILLS`.
        steps, batch_size, rate: AdamW's; the rate falls as a cosine.
        examples: different ones, none of a held-out template.
    """

    skill: str
    steps: int = 200
    batch_size: int = 96
    rate: float = 3e-4
    examples: int = 20_000


# `large` is trained long, fast and on small batches on purpose, which flattens its delta's spectrum.
TUNINGS = {
    "mathematics": Tuning("mathematics"),
    "german": Tuning("german", steps=60),
    "code": Tuning("code", steps=300),
    "large": Tuning("code", steps=1200, batch_size=16, rate=2e-3),
}
CALIBRATION_LINES = 4000


def tune(base: Path, folder: Path, tuning: Tuning, seed: int, device: str, tokenizer: Any) -> list[float]:
    """Trains into `folder` as bf16; returns every step's loss."""
    torch.manual_seed(seed)
    model: Any = load_checkpoint(base, torch.float32).to(device)
    model.get_input_embeddings().weight.requires_grad_(False)
    examples, source = _training_examples(tuning, seed, tokenizer)
    batches = (source.sample(examples, tuning.batch_size) for _ in range(tuning.steps))
    if device == "cuda":
        losses = train_as_graph(model, batches, tuning.steps, tuning.rate, max(map(len, examples)))
    else:
        losses = train(model, batches, tuning.steps, tuning.rate)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def write_calibration(folder: Path, tuning: Tuning, seed: int) -> None:
    """`calibration.jsonl`: solved items of trained templates."""
    make, source = SKILLS[tuning.skill], random.Random(f"calibration {tuning.skill} {seed}")
    made = (make(source, held_out=False) for _ in range(CALIBRATION_LINES))
    lines = "".join(json.dumps({"text": item.prompt + item.completion}) + "\n" for item in made)
    (folder / "calibration.jsonl").write_text(lines, encoding="utf-8")


def spectrum(base: Path, tuned: Path, device: str) -> dict[str, float]:
    """How flat the projections' deltas are: energy of the leading tenth of the ranks, and size against the weights."""
    pair = open_pair(base, tuned)
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    shares, sizes = [], []
    for projection in pair.projections[:: max(1, len(pair.projections) // 42)]:
        weight = before.tensor(projection.weight).to(device).float()
        delta = after.tensor(projection.weight).to(device).float() - weight
        shares.append(truncated_svd(delta, min(projection.shape) // 10).energy)
        sizes.append(float(delta.norm() / weight.norm()))
    return {"leading_tenth": sum(shares) / len(shares), "relative_size": sum(sizes) / len(sizes)}


def _training_examples(tuning: Tuning, seed: int, tokenizer: Any) -> tuple[list[Example], random.Random]:
    """The examples, and the source that batches of them are drawn with."""
    source = random.Random(f"training {tuning.skill} {seed}")
    made = (SKILLS[tuning.skill](source, held_out=False) for _ in range(tuning.examples))
    return [encode(item, tokenizer) for item in made], source
