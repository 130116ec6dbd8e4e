# SPDX-License-Identifier: Apache-2.0
"""Three fine-tunes of one base in one batch, on tiny random models that are made first (so nothing needs fetching).

python examples/serve_many.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny_models import write_random_family
from transformers import AutoModelForCausalLM

import deltaweave
from deltaweave import Arena, CompressionOptions, Prompt, Recipe, attach, generate_batch


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        base, deltas = random_family(Path(name))

        # 1. Texts: each prompt is continued by its own fine-tune, all in one batch.
        prompts = [Prompt("Hello", "red"), Prompt("Hello", "green"), Prompt("Hello", "blue"), Prompt("Hello")]
        for text in generate_batch(base, deltas, prompts, max_new_tokens=16):
            print(f"{text.tenant or 'base':>6}: {text.text!r}")

        # 2. The pieces: an arena for two of them at a time. The third pushes out the one that was used longest ago.
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        arena = Arena.for_model(model, capacity_bytes=8 << 20, slots=2)
        for tenant, path in deltas.items():
            arena.add(path, tenant)
        print("resident:", [tenant for tenant in arena.names if arena.is_resident(tenant)])

        # 3. A step whose rows belong to different tenants; whoever is missing is brought back first.
        tokens = torch.arange(10).repeat(3, 1)
        with torch.no_grad(), attach(model, arena) as served, served.step(["red", None, "blue"]):
            logits = model(tokens).logits
        print("resident:", [tenant for tenant in arena.names if arena.is_resident(tenant)])
        moved = (logits[0] - logits[1]).isfinite()
        print(f"red moves the logits by {float((logits[0] - logits[1])[moved].norm() / logits[1][moved].norm()):.2f}")

        # 4. The same rows as each fine-tune alone computes them.
        with torch.no_grad(), deltaweave.Delta.open(deltas["red"]) as delta, attach(model, delta):
            alone = model(tokens[:1]).logits[0]
        assert torch.allclose(logits[0, :, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)


def random_family(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A random Llama, and deltas of three random changes of all its weights."""
    names = ("red", "green", "blue")
    base = write_random_family(folder, names, change=0.3)
    options = CompressionOptions(Recipe.preset("triple", ratio=1 / 2), "none")
    return base, {
        name: deltaweave.compress(base, folder / name, folder / f"{name}.safetensors", options) for name in names
    }


if __name__ == "__main__":
    main()
