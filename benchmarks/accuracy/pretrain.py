# SPDX-License-Identifier: Apache-2.0
"""A small base from scratch, of another family than SmolLM2: Qwen2's blocks, trained on Python's own source.

    python benchmarks/accuracy/pretrain.py --tokenizer DIR --output DIR

For `experiment.py --base`: a model on which nothing of the method was developed. About a minute on a GPU.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

from deltaweave.models import load_tokenizer

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder whose tokenizer is taken")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--megabytes", type=int, default=32, help="of source to read")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(arguments.tokenizer)
    rows = _rows(tokenizer, arguments.megabytes * 2**20)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(_config(arguments, len(tokenizer), tokenizer.eos_token_id)).to(device)
    loss = _train(model, _batches(rows, arguments.batch_size, device), arguments.steps, arguments.rate)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{arguments.output}: {rows.numel()} tokens of source, last loss {loss:.3f}")


def _config(arguments: argparse.Namespace, vocabulary: int, end: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=arguments.hidden_size // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )


def _rows(tokenizer: object, most: int) -> torch.Tensor:
    """[rows, LENGTH] tokens of the standard library's modules, in a shuffled order that is always the same."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts and "dist-packages" not in file.parts]
    random.Random(0).shuffle(files)
    texts, read = [], 0
    for file in files:
        if read >= most:
            break
        text = file.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        read += len(text)
    tokens = [token for row in tokenizer(texts)["input_ids"] for token in [*row, tokenizer.eos_token_id]]  # type: ignore[operator,attr-defined]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)


def _batches(rows: torch.Tensor, batch_size: int, device: str) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield rows[torch.randint(len(rows), (batch_size,), generator=generator)].to(device)


def _train(model: Qwen2ForCausalLM, batches: Iterator[torch.Tensor], steps: int, rate: float) -> float:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=device.type == "cuda")
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for _, tokens in zip(range(steps), batches, strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss.detach())


if __name__ == "__main__":
    main()
