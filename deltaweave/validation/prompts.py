# SPDX-License-Identifier: Apache-2.0
"""The prompts of a validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaweave.formats import DeltaweaveError
from deltaweave.generation import encode_prompt

__all__ = ["Prompt", "TokenizedPrompt", "load_prompts", "tokenize"]


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        prompt: what the model is given.
        answer: text that scores are taken over besides the prompt; None for what the fine-tune itself writes.
    """

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the models see it; `answer` is None where the prompt has none."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...] | None


def load_prompts(path: str | Path, most: int | None = None) -> list[Prompt]:
    """Reads JSONL lines with `prompt` and, if wanted, `answer`.

    Raises:
        DeltaweaveError: naming the line that is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaweaveError(f"{path}: not readable as UTF-8 text ({error})") from error
    prompts = [_parse(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DeltaweaveError(f"{path}: holds no prompts")
    return prompts[:most]


def tokenize(tokenizer: Any, prompts: Sequence[Prompt], chat: bool) -> list[TokenizedPrompt]:
    """Tokens of all prompts.

    Raises:
        DeltaweaveError: a prompt without tokens, or no chat template where one is wanted.
    """
    return [
        TokenizedPrompt(
            tuple(encode_prompt(tokenizer, prompt.prompt, chat)),
            None if prompt.answer is None else tuple(tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]),
        )
        for prompt in prompts
    ]


def _parse(where: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
        prompt, answer = entry["prompt"], entry.get("answer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaweaveError(f"{where}: expected an object with prompt and, if wanted, answer") from error
    if not isinstance(prompt, str) or not prompt:
        raise DeltaweaveError(f"{where}: prompt must be a text that is not empty")
    if answer is not None and (not isinstance(answer, str) or not answer):
        raise DeltaweaveError(f"{where}: answer must be a text that is not empty, or left out")
    return Prompt(prompt, answer)
