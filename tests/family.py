# SPDX-License-Identifier: Apache-2.0
"""A tiny base with several fine-tunes, and what each computes alone: the oracle of everything that mixes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter import CompressionOptions, Policies, Recipe, compress
from deltaweave.formats import Delta
from deltaweave.runtime_plugin.pytorch import Arena, attach
from helpers import perturbed, tiny_checkpoint
from transformers import AutoModelForCausalLM

__all__ = ["Family", "edit_config", "finetune", "load"]

# Groups of 128: what the kernels, and so the arena, take.
OPTIONS = CompressionOptions(Recipe(bands="8:2,2:*", ratio=3 / 4, group_size=128), "none")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def finetune(
    base: Path,
    folder: Path,
    *,
    policy: str = "auto",
    edit: Callable[[Path], None] | None = None,
    **changes: Any,
) -> Path:
    """The delta of a fine-tune of `base` with `changes` (of `perturbed`), edited before it is compressed."""
    tuned = perturbed(base, folder / "tuned", **changes)
    if edit:
        edit(tuned)
    options = CompressionOptions(OPTIONS.recipe, "none", policies=Policies(policy, policy))
    return compress(base, tuned, folder / "delta.safetensors", options)


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@dataclass
class Family:
    """A base model, its fine-tunes by name, and an arena for them."""

    folder: Path
    model: Any
    deltas: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def make(
        cls, folder: Path, family: str = "llama", *, config: dict[str, Any] | None = None, **settings: Any
    ) -> Family:
        """A base of `tiny_checkpoint`, its config.json changed by `config`."""
        base = tiny_checkpoint(folder / "base", family, **{"dtype": torch.float32, **settings})
        edit_config(base, **(config or {}))
        return cls(folder, load(base))

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return self.folder / "base"

    def add(self, name: str, **changes: Any) -> Path:
        """Another fine-tune; see `finetune`."""
        (self.folder / name).mkdir()
        self.deltas[name] = finetune(self.base, self.folder / name, **changes)
        return self.deltas[name]

    def arena(self, **settings: Any) -> Arena:
        """An arena with all fine-tunes."""
        arena = Arena.for_model(self.model, **{"capacity_bytes": 8 << 20, "slots": 4, **settings})
        for name, path in self.deltas.items():
            arena.add(path, name)
        return arena

    @torch.no_grad()
    def alone(self, name: str | None, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the whole batch from one fine-tune through the reference op, or from the base."""
        if name is None:
            logits: torch.Tensor = self.model(tokens, use_cache=False).logits
            return logits
        with Delta.open(self.deltas[name]) as delta, attach(self.model, delta):
            return self.alone(None, tokens)

    @torch.no_grad()
    def greedy(self, name: str | None, prompt: list[int], count: int) -> list[int]:
        """New tokens of one fine-tune by Transformers' own generation."""
        if name is not None:
            with Delta.open(self.deltas[name]) as delta, attach(self.model, delta):
                return self.greedy(None, prompt, count)
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
        found: list[int] = self.model.generate(ids, attention_mask=mask, **settings)[0, len(prompt) :].tolist()
        return found
