# SPDX-License-Identifier: Apache-2.0
"""Trains the experts: a LoRA a skill, and a full fine-tune of the projections that our converter compresses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter import CompressionOptions, Policies, Recipe, compress
from finetune import encode, train
from peft import LoraConfig, get_peft_model
from tasks import SKILLS
from torch import nn

from deltaweave.gates.examples import Example
from deltaweave.models import load_checkpoint

__all__ = ["SkillRecipe", "make_delta", "train_lora", "train_xlora"]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CALIBRATION_LINES = 4000


@dataclass(frozen=True)
class SkillRecipe:
    """How an expert is trained.

    Attributes:
        steps, batch_size: AdamW's.
        examples: different ones, seen again and again.
        lora_rate, full_rate: highest learning rates.
        rank, alpha: of a LoRA on all seven projections.
        ratio: of a delta's projections.
        calibration: sequences of 256 tokens.
    """

    steps: int = 240
    batch_size: int = 192
    examples: int = 20_000
    lora_rate: float = 1e-3
    full_rate: float = 3e-4
    rank: int = 32
    alpha: int = 32
    ratio: float = 1 / 16
    calibration: int = 32


def train_lora(base: Path, skill: str, folder: Path, recipe: SkillRecipe, device: str, tokenizer: Any) -> list[float]:
    """A LoRA, as PEFT trains and saves it; returns every step's loss."""
    torch.manual_seed(0)
    model = load_checkpoint(base, torch.bfloat16).to(device)
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    losses = train(tuned, _skill_batches(skill, recipe, tokenizer), recipe.steps, recipe.lora_rate)
    tuned.save_pretrained(str(folder))
    return losses


def make_delta(base: Path, skill: str, folder: Path, recipe: SkillRecipe, device: str, tokenizer: Any) -> list[float]:
    """A full fine-tune of the projections, compressed into `folder/SKILL.safetensors`; returns every step's loss."""
    torch.manual_seed(0)
    model: Any = load_checkpoint(base, torch.float32).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight").endswith(tuple(PROJECTIONS)))
    losses = train(model, _skill_batches(skill, recipe, tokenizer), recipe.steps, recipe.full_rate)
    tuned = folder / f"{skill}-tuned"
    model.to(torch.bfloat16).save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    source = random.Random(f"calibration {skill}")
    made = (SKILLS[skill](source) for _ in range(CALIBRATION_LINES))
    text = folder / f"{skill}-calibration.jsonl"
    text.write_text("".join(json.dumps({"text": item.prompt + item.completion}) + "\n" for item in made))
    options = CompressionOptions(
        Recipe.preset("triple", ratio=recipe.ratio),
        calibration=str(text),
        samples=recipe.calibration,
        sequence_length=256,
        policies=Policies(embeddings="base", lm_head="base"),
        device=device,
    )
    compress(base, tuned, folder / f"{skill}.safetensors", options, force=True)
    return losses


def train_xlora(
    model: nn.Module, examples: list[Example], epochs: int, batch_size: int, rate: float, seed: int
) -> None:
    """X-LoRA's classifier, on the same examples as the gates."""
    order = random.Random(seed)

    def batches() -> Iterator[list[Example]]:
        for _ in range(epochs):
            shuffled = order.sample(examples, len(examples))
            yield from (shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size))

    train(model, batches(), epochs * math.ceil(len(examples) / batch_size), rate)


def _skill_batches(skill: str, recipe: SkillRecipe, tokenizer: Any) -> Iterator[list[Example]]:
    source = random.Random(f"training {skill}")
    examples = [encode(SKILLS[skill](source), tokenizer) for _ in range(recipe.examples)]
    while True:
        yield source.sample(examples, recipe.batch_size)
