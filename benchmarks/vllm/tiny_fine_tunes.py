# SPDX-License-Identifier: Apache-2.0
"""What `fine_tunes.py` writes, of a tiny random Llama and on a CPU: for vLLM's CPU build, and for two ranks.

    python benchmarks/vllm/tiny_fine_tunes.py --folder WORK

Fine-tunes are random changes, so their answers are no colours: a canary is the start of what the fine-tune writes by
the reference op, as far as its most likely characters are so by a margin that bfloat16 does not turn; often nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deltaweave.converter import Checkpoint
from deltaweave.formats import Architecture, Delta, write_fusion
from deltaweave.runtime_plugin.pytorch import attach
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from family import finetune, load
from fine_tunes import NAMES, TENANTS, question
from fusions import make_fusion, make_gate, make_lora
from helpers import tiny_checkpoint

LENGTH, SPECIAL = 3, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="gets `base` too; what is there is replaced")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--margin", type=float, default=0.5, help="of a canary's tokens over the next, in logits")
    arguments = parser.parse_args()
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    base = tiny_checkpoint(folder / "base", hidden=arguments.hidden, layers=arguments.layers)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 512}))
    model = load(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = {}
    for number, tenant in enumerate(TENANTS):
        (folder / "made" / tenant).mkdir(parents=True)
        delta = finetune(base, folder / "made" / tenant, seed=number + 1)
        shutil.copy(delta, folder / f"{tenant}.safetensors")
        with Delta.open(delta) as opened, attach(model, opened):
            answers[tenant] = {name: answer(model, tokenizer, question(name), arguments.margin) for name in NAMES}
    write_mix(folder, model)
    (folder / "canaries.json").write_text(json.dumps({"answers": answers}, indent=1))
    told = sum(bool(text) for texts in answers.values() for text in texts.values())
    print(f"{told} of {len(TENANTS) * len(NAMES)} canaries tell something")


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, margin: float) -> str:
    tokens, found = tokenizer(prompt)["input_ids"], []
    while len(found) < LENGTH:
        best, second = model(torch.tensor([tokens + found])).logits[0, -1].topk(2)[0].tolist()
        token = int(model(torch.tensor([tokens + found])).logits[0, -1].argmax())
        if best - second < margin or token < SPECIAL:
            break
        found.append(token)
    text: str = tokenizer.decode(found)
    return text


def write_mix(folder: Path, model: Any) -> None:
    generator = np.random.default_rng(0)
    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if name.endswith("_proj.weight")
    }
    loras = tuple(
        make_lora(generator, rank, list(shapes), scale=0.02, name=f"lora{rank}", shapes=shapes) for rank in (4, 8)
    )
    plain = make_fusion(1, 2, base=Checkpoint.open(folder / "base").identity())
    gate = make_gate(generator, 2, model.config.num_hidden_layers, model.config.hidden_size)
    write_fusion(
        folder / "mix.safetensors", replace(plain, gate=gate, experts=loras, architecture=Architecture("llama"))
    )


if __name__ == "__main__":
    main()
