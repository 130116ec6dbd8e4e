# SPDX-License-Identifier: Apache-2.0
"""Three fine-tunes of one base in one batch, on tiny random models that are made first (so nothing needs fetching).

python examples/serve_many.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    characters = [chr(code) for code in range(32, 127)] + ["\n", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in ("base", "red", "green", "blue"):
        model.to(torch.bfloat16).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                change = 0.3 * weights[key].std().nan_to_num(1) * torch.randn_like(weights[key])
                parameter.copy_(weights[key].bfloat16() + change)
    options = CompressionOptions(Recipe.preset("triple", ratio=1 / 2), "none")
    return folder / "base", {
        name: deltaweave.compress(folder / "base", folder / name, folder / f"{name}.safetensors", options)
        for name in ("red", "green", "blue")
    }


if __name__ == "__main__":
    main()
