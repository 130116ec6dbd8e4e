# SPDX-License-Identifier: Apache-2.0
"""Training examples: JSONL lines to tokens of a prompt and of its answer, which alone is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaweave.gates.experts import GateError

__all__ = ["Batch", "Example", "ExampleSet", "collate", "encode_example", "load_examples"]

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One example in tokens.

    Attributes:
        prompt: what the model is given.
        answer: what it is to write, with the end token.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one file.

    Attributes:
        name: the file's.
        sha256: of its bytes.
        examples: those that are kept.
        dropped: how many were longer than allowed.
    """

    name: str
    sha256: str
    examples: tuple[Example, ...]
    dropped: int = 0

    def describe(self) -> dict[str, Any]:
        """What a fusion says of its training data."""
        return {
            "source": self.name,
            "sha256": self.sha256,
            "examples": len(self.examples),
            "answer_tokens": sum(len(example.answer) for example in self.examples),
            "dropped": self.dropped,
        }

    def split(self, share: float, seed: int) -> tuple[ExampleSet, ExampleSet]:
        """Sets a share of the examples, drawn at random, apart; the first set is the rest."""
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed)).tolist()
        apart = round(share * len(order))
        if not 0 < apart < len(order):
            raise GateError(f"{self.name}: a share of {share} of {len(order)} examples leaves a set empty")
        held, rest = sorted(order[:apart]), sorted(order[apart:])
        return self._only(rest), self._only(held)

    def _only(self, indices: Sequence[int]) -> ExampleSet:
        return ExampleSet(self.name, self.sha256, tuple(self.examples[index] for index in indices), self.dropped)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        tokens: [examples, length] int64.
        mask: [examples, length] int64, 0 at padding.
        targets: [examples, length] int64, the next token where it belongs to an answer, else -100.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.tokens.to(device), self.mask.to(device), self.targets.to(device))


def load_examples(path: str | Path, tokenizer: Any, *, chat: bool = False, max_length: int = 2048) -> ExampleSet:
    """Reads JSONL whose lines have `messages` (the last one is the answer), or `prompt` and `completion` (or `answer`).

    Args:
        path: the file.
        tokenizer: of the base.
        chat: wrap prompts in the tokenizer's chat template, as `messages` always are.
        max_length: longer examples are left out and counted.

    Raises:
        GateError: naming the line that is wrong; no example left.
    """
    try:
        content = Path(path).read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(f"{path}: not readable as UTF-8 text ({error})") from error
    found = [
        encode_example(_parse(line, f"{path}:{number}"), tokenizer, f"{path}:{number}", chat=chat)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    kept = tuple(example for example in found if len(example) <= max_length)
    if not kept:
        raise GateError(f"{path}: holds no examples of at most {max_length} tokens (of {len(found)} in all)")
    return ExampleSet(Path(path).name, hashlib.sha256(content).hexdigest(), kept, len(found) - len(kept))


def encode_example(entry: Any, tokenizer: Any, where: str, *, chat: bool = False) -> Example:
    """Tokens of one line's prompt and answer, tokenized apart as generation will have it.

    Raises:
        GateError: a line of another form, or an empty prompt or answer.
    """
    messages = _messages(entry, where, chat)
    if messages is None:
        prompt = tokenizer(entry["prompt"])["input_ids"]
        text, end = _completion(entry, where), [tokenizer.eos_token_id]
    else:
        prompt_text, text = _rendered(messages, tokenizer, where)
        prompt, end = tokenizer(prompt_text, add_special_tokens=False)["input_ids"], []
    answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [token for token in end if token is not None]
    if tokenizer.eos_token_id in answer:  # a template may go on behind it; generation does not
        answer = answer[: len(answer) - answer[::-1].index(tokenizer.eos_token_id)]
    if not prompt or not text.strip():
        raise GateError(f"{where}: prompt and answer must not be empty")
    return Example(tuple(prompt), tuple(answer))


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Puts examples side by side.

    Args:
        examples: at least one.
        pad: token that fills rows up.
    """
    tokens = torch.full((len(examples), max(map(len, examples))), pad)
    mask = torch.zeros_like(tokens)
    targets = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(examples):
        count, start = len(example), len(example.prompt)
        tokens[row, :count] = torch.tensor(example.prompt + example.answer)
        mask[row, :count] = 1
        targets[row, start - 1 : count - 1] = torch.tensor(example.answer)
    return Batch(tokens, mask, targets)


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise GateError(f"{where}: not JSON ({error})") from error


def _messages(entry: Any, where: str, chat: bool) -> list[dict[str, str]] | None:
    """The conversation of a line; None if its prompt goes to the model as it is."""
    if not isinstance(entry, dict):
        raise GateError(f"{where}: {type(entry).__name__}, expected an object")
    messages = entry.get("messages")
    if messages is None:
        if not isinstance(entry.get("prompt"), str):
            raise GateError(f"{where}: has neither `messages` nor `prompt` and `completion`")
        if not chat:
            return None
        return [
            {"role": "user", "content": entry["prompt"]},
            {"role": "assistant", "content": _completion(entry, where)},
        ]
    whole = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not whole or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise GateError(f"{where}: `messages` must be turns with role and content, the last one the assistant's")
    return list(messages)


def _completion(entry: dict[str, Any], where: str) -> str:
    found = entry.get("completion", entry.get("answer"))
    if not isinstance(found, str):
        raise GateError(f"{where}: has `prompt` but no `completion`")
    return found


def _rendered(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[str, str]:
    """What the chat template makes of the turns before the answer, and what it adds for the answer."""
    if not tokenizer.chat_template:
        raise GateError(f"{where}: needs a chat template, the base's tokenizer has none")
    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs of the model's author
        raise GateError(f"{where}: the chat template refuses it ({str(error).partition(chr(10))[0]})") from error
    if not whole.startswith(prompt):
        raise GateError(f"{where}: the chat template writes the turns before an answer otherwise once it is there")
    return prompt, whole[len(prompt) :]
