# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on generated items, and asking what came of it: shared by the experiments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, get_cosine_schedule_with_warmup

from deltaweave.evaluation.text import TextScore, TextTotals
from deltaweave.gates.examples import Example, collate, encode_example
from deltaweave.gates.training import IGNORED, answer_loss

__all__ = ["Prompted", "encode", "replies", "score_answers", "train"]


class Prompted(Protocol):
    """An item: what the model is given, and what it must write."""

    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...


def encode(item: Prompted, tokenizer: Any) -> Example:
    """An item in tokens."""
    return encode_example({"prompt": item.prompt, "completion": item.completion}, tokenizer, "item")


def train(model: Any, batches: Iterable[list[Example]], steps: int, rate: float) -> list[float]:
    """AdamW over what asks for gradients, in bfloat16 where a GPU does it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    losses = []
    for _, examples in zip(range(steps), batches, strict=False):
        batch = collate(examples, 0).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def replies(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Greedy answers, each up to the end token."""
    end = tokenizer.eos_token_id
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    device = next(model.parameters()).device
    tokens = torch.tensor([[end] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    grown = model.generate(input_ids=tokens, attention_mask=mask, generation_config=greedy)
    rows = [row[: row.index(end)] if end in row else row for row in grown[:, width:].tolist()]
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


@torch.no_grad()
def score_answers(
    reference: Any, candidate: Any, examples: Sequence[Example], batch_size: int = 64
) -> tuple[TextScore, TextScore]:
    """KL to `reference` and perplexity over the answers' tokens, given their prompts; and over the prompts' tokens."""
    answers, prompts = TextTotals(), TextTotals()
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], 0).to(reference.device)
        answered = batch.targets != IGNORED
        asked = batch.mask.bool() & ~answered
        expected, found = (
            model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
            for model in (reference, candidate)
        )
        following = batch.tokens.roll(-1, 1)
        answers.add(expected[answered], found[answered], batch.targets[answered])
        prompts.add(expected[asked], found[asked], following[asked])
    return answers.score(), prompts.score()
