# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on generated items, and asking what came of it: shared by the experiments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, get_cosine_schedule_with_warmup

from deltaweave.evaluation.text import TextScore, TextTotals
from deltaweave.gates.examples import Batch, Example, collate, encode_example
from deltaweave.gates.training import IGNORED, answer_loss

__all__ = ["Prompted", "encode", "padded_loss", "replies", "score_answers", "train", "train_as_graph"]

# Steps before the one that is captured, in which libraries and the optimizer make what they keep.
WARM_UP = 4


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


def train_as_graph(model: Any, batches: Iterable[list[Example]], steps: int, rate: float, longest: int) -> list[float]:
    """`train` with a step as one CUDA graph: a small model's step takes 0.2 s, nearly all of it to launch kernels.

    Args:
        model: on a GPU.
        batches: at least `steps`, all of as many examples.
        steps: of AdamW.
        rate: the learning rate at its highest.
        longest: tokens of the longest example; all rows are padded to as many, which changes no loss.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, following = parameters[0].device, iter(batches)
    learning_rate = torch.tensor(rate, device=device)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True, capturable=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    batch = _padded(next(following), longest).to(device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = padded_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    def load(examples: list[Example]) -> None:
        found = _padded(examples, longest)
        for mine, theirs in ((batch.tokens, found.tokens), (batch.mask, found.mask), (batch.targets, found.targets)):
            mine.copy_(theirs.pin_memory(), non_blocking=True)

    losses, aside = [], torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for index in range(min(WARM_UP, steps)):
            if index:
                load(next(following))
            optimizer.zero_grad()
            losses.append(step())
            schedule.step()
    torch.cuda.current_stream().wait_stream(aside)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _, examples in zip(range(WARM_UP, steps), following, strict=False):
        load(examples)
        graph.replay()
        losses.append(loss.clone())
        schedule.step()
    return torch.stack(losses).tolist()


def padded_loss(model: Any, batch: Batch) -> torch.Tensor:
    """`answer_loss` without a question to the GPU of how many tokens there are."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)


def _padded(examples: Sequence[Example], longest: int) -> Batch:
    found, pad = collate(examples, 0), nn.functional.pad
    beyond = (0, -(-longest // 8) * 8 - found.tokens.shape[1])  # attention's kernels take whole eights
    return Batch(pad(found.tokens, beyond), pad(found.mask, beyond), pad(found.targets, beyond, value=IGNORED))


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
