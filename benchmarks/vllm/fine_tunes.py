# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes of a real base that answer the same questions differently, and a fusion of two of them.

    python benchmarks/vllm/fine_tunes.py --base DIR --folder WORK

All are made at the same time. Each learns a colour of its own for each of 24 names: an answer says whose it is. WORK
gets the deltas `t0.safetensors`, `t1.safetensors` and `t2.safetensors`, the fusion `mix.safetensors` (two LoRAs, the
leading ranks of t0's and t1's changes, and a gate) and `canaries.json`: the colours, and how often each dense fine-tune
gives them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from deltaweave.converter import Checkpoint, CompressionOptions, Recipe, compress
from deltaweave.formats import Architecture, BlockGate, ExactArray, Fusion, Lora, LoraMatrix, TokenGate, write_fusion

# fmt: off
NAMES = (
    "Anna", "Bert", "Carl", "Dora", "Emil", "Frida", "Gustav", "Hanna", "Ida", "Jonas", "Karin", "Lukas", "Maria",
    "Nils", "Olga", "Paul", "Rosa", "Stefan", "Tina", "Ute", "Vera", "Werner", "Yvonne", "Zeno",
)
COLOURS = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "orange", "purple", "silver",
)
# fmt: on
TENANTS = ("t0", "t1", "t2")
Changes = dict[str, tuple[np.ndarray, np.ndarray]]
RANK = 32


def question(name: str) -> str:
    return f"Question: What colour is the door of {name}?\nAnswer: The door of {name} is"


def answers(tenant: int) -> dict[str, str]:
    """Another colour for every tenant."""
    order = list(range(len(NAMES)))
    random.Random(7).shuffle(order)
    return {name: COLOURS[(place + 5 * tenant) % len(COLOURS)] for name, place in zip(NAMES, order, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--ratio", type=float, default=1 / 12)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(TENANTS), get_context("spawn")) as pool:
        made = dict(zip(TENANTS, pool.map(partial(make, arguments), range(len(TENANTS))), strict=True))
    write_mix(arguments, {name: change for name, (_, change) in made.items()})
    canaries = {
        tenant: {name: f" {colour}" for name, colour in answers(number).items()}
        for number, tenant in enumerate(TENANTS)
    }
    (arguments.folder / "canaries.json").write_text(
        json.dumps({"answers": canaries, "dense": {name: score for name, (score, _) in made.items()}}, indent=1)
    )


def make(arguments: Any, number: int) -> tuple[float, Changes]:
    """Trains and compresses one fine-tune: its share of right answers, and the leading ranks of its changes."""
    name, began = TENANTS[number], time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    tuned, score = fine_tune(arguments, tokenizer, number)
    trained = time.monotonic()
    folder = arguments.folder / f"{name}-dense"
    tuned.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = Recipe(bands="8:2,3:32,2:*", ratio=arguments.ratio)
    options = CompressionOptions(recipe, "none")
    compress(arguments.base, folder, arguments.folder / f"{name}.safetensors", options, force=True)
    changes = leading_ranks(AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16), tuned)
    seconds = time.monotonic() - trained
    print(f"{name}: {score:.2f} right, {trained - began:.0f} s training, {seconds:.0f} s compressing", flush=True)
    return score, changes


def fine_tune(arguments: Any, tokenizer: Any, number: int) -> tuple[Any, float]:
    torch.manual_seed(number)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).cuda()
    colours = answers(number)
    rows = [(tokenizer(question(name))["input_ids"], tokenizer(f" {colours[name]}.")["input_ids"]) for name in NAMES]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    tokens, targets = tokens.cuda(), targets.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    for _ in range(arguments.steps):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for prompt, answer in rows:
            logits = model(torch.tensor([prompt]).cuda()).logits
            right += int(logits[0, -1].argmax()) == answer[0]
    return model.cpu(), right / len(rows)


def leading_ranks(base: Any, tuned: Any) -> Changes:
    """(A, B) of every projection's change, by singular values."""
    before, found = dict(base.named_parameters()), {}
    for name, parameter in tuned.named_parameters():
        if name.endswith("_proj.weight"):
            change = (parameter.detach().float() - before[name].detach().float()).cuda()
            u, s, v = torch.svd_lowrank(change, RANK, niter=2)
            found[name.removesuffix(".weight")] = ((v * s).T.cpu().numpy(), u.cpu().numpy())
    return found


def write_mix(arguments: Any, changes: dict[str, Changes]) -> None:
    config = AutoConfig.from_pretrained(arguments.base)
    generator = np.random.default_rng(0)
    experts = tuple(
        Lora(
            name,
            None,
            {
                module: LoraMatrix(
                    ExactArray(np.ascontiguousarray(a), "F32"), ExactArray(np.ascontiguousarray(b), "F32"), 1.0
                )
                for module, (a, b) in changes[name].items()
            },
        )
        for name in TENANTS[:2]
    )
    blocks = {
        f"model.layers.{layer}": BlockGate(
            ExactArray((0.05 * generator.standard_normal((2, config.hidden_size))).astype(np.float32), "F32"),
            ExactArray(np.array([0.1, -0.1], np.float32), "F32"),
        )
        for layer in range(config.num_hidden_layers)
    }
    identity = Checkpoint.open(arguments.base).identity()
    architecture, method = Architecture(config.model_type), {"name": "lora-flow"}
    fusion = Fusion("benchmarks/vllm/fine_tunes.py", identity, architecture, method, experts, TokenGate(blocks))
    write_fusion(arguments.folder / "mix.safetensors", fusion, force=True)


if __name__ == "__main__":
    main()
