# SPDX-License-Identifier: Apache-2.0
"""Scores over a task: the share of prompts that greedy decoding answers exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from deltaweave.formats import DeltaweaveError

__all__ = ["Task", "TaskScore", "complete", "complete_tokens", "load_tasks", "score_task"]

BATCH = 64
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Task:
    """One line of a task file: the model is given `prompt` and must write `answer`."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class TaskScore:
    """Answers that match exactly, white space at the ends aside.

    Attributes:
        correct: how many.
        total: of how many.
    """

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share that is correct."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        share, square = self.accuracy, NORMAL_95**2
        centre = (share + square / (2 * self.total)) / (1 + square / self.total)
        spread = math.sqrt(share * (1 - share) / self.total + square / (4 * self.total**2))
        half = NORMAL_95 * spread / (1 + square / self.total)
        return max(0.0, centre - half), min(1.0, centre + half)


def load_tasks(path: str | Path, most: int | None = None) -> list[Task]:
    """Reads JSONL lines with `prompt` and `answer`.

    Raises:
        DeltaweaveError: naming the line that is wrong.
    """
    tasks = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaweaveError(f"{path}: not readable as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            task = Task(str(entry["prompt"]), str(entry["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaweaveError(f"{path}:{number}: expected an object with prompt and answer") from error
        if not task.prompt or not task.answer.strip():
            raise DeltaweaveError(f"{path}:{number}: prompt and answer must not be empty")
        tasks.append(task)
    if not tasks:
        raise DeltaweaveError(f"{path}: holds no tasks")
    return tasks[:most]


def score_task(model: PreTrainedModel, tokenizer: Any, tasks: Sequence[Task]) -> TaskScore:
    """Answers every prompt greedily, in batches, and compares."""
    # One token more than the longest answer, so that an answer that goes on is seen to be wrong.
    length = 1 + max(len(tokenizer(task.answer, add_special_tokens=False)["input_ids"]) for task in tasks)
    answers = complete(model, tokenizer, [task.prompt for task in tasks], length)
    correct = sum(answer.strip() == task.answer.strip() for answer, task in zip(answers, tasks, strict=True))
    return TaskScore(correct, len(tasks))


def complete(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], most: int) -> list[str]:
    """Continues prompts greedily by at most `most` tokens each; returns the new text up to the end token."""
    end = tokenizer.eos_token_id
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = complete_tokens(model, rows, most, () if end is None else (end,), tokenizer.pad_token_id)
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


@torch.no_grad()
def complete_tokens(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], most: int, stop: Collection[int], pad: int | None = None
) -> list[list[int]]:
    """Continues token rows greedily, in batches.

    Args:
        model: whose own generation settings play no part.
        prompts: at least one token each.
        most: new tokens at most.
        stop: tokens that end a row.
        pad: fills rows up; None for a stop token, or 0.

    Returns:
        The new tokens of each row, the one that ended it left out.
    """
    filler = next(iter(sorted(stop)), 0) if pad is None else pad
    # The model's own settings (a repetition penalty, say) would fill in what these leave open.
    own, model.generation_config = model.generation_config, GenerationConfig()
    greedy = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=sorted(stop) or None, pad_token_id=filler
    )
    try:
        batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        return [answer for batch in batches for answer in _complete_batch(model, batch, greedy, stop)]
    finally:
        model.generation_config = own


def _complete_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig, stop: Collection[int]
) -> list[list[int]]:
    width = max(len(row) for row in prompts)
    # Padding stands on the left, so that every prompt ends where its answer begins.
    pad = settings.pad_token_id or 0
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    grown = model.generate(tokens, attention_mask=mask, generation_config=settings)
    return [_until(row, stop) for row in grown[:, width:].tolist()]


def _until(tokens: list[int], stop: Collection[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stop, tokens))
