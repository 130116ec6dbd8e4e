# SPDX-License-Identifier: Apache-2.0
"""Text to token windows: what a compression is calibrated on, and what its quality is measured on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.errors import CalibrationError
from transformers import AutoTokenizer

__all__ = ["DEFAULT_TEXT", "HELD_OUT_TOKENS", "CalibrationData", "default_sequence_length", "source_digest"]

DEFAULT_TEXT = "default"
# What a quality is measured on: short pieces meet more kinds of text, and this many tell KLs apart to a few percent.
HELD_OUT_LENGTH, HELD_OUT_TOKENS = 256, 16384


@dataclass(frozen=True)
class CalibrationData:
    """Token windows drawn from a text.

    Attributes:
        tokens: [samples, sequence_length] int64.
        source: the file's name, or `default`.
        sha256: of the text's bytes.
    """

    tokens: torch.Tensor
    source: str
    sha256: str

    @classmethod
    def load(
        cls,
        source: str | Path,
        tokenizer_folder: Path,
        samples: int,
        sequence_length: int,
        seed: int,
    ) -> CalibrationData:
        """Reads a text, tokenizes it and draws windows at random places.

        Args:
            source: `default`, a .txt file, or a .jsonl file whose lines have `text`, `messages`, or
                `prompt` and `answer`.
            tokenizer_folder: the checkpoint whose tokenizer is used.
            samples: number of windows.
            sequence_length: tokens per window.
            seed: of the random places.

        Raises:
            CalibrationError: an unreadable or too short text, or a folder without a tokenizer.
        """
        text = _Text.read(source, tokenizer_folder)
        return text.data(_windows(text.tokens, text.name, samples, sequence_length, seed))

    @classmethod
    def split(
        cls, source: str | Path, tokenizer_folder: Path, samples: int, sequence_length: int, seed: int
    ) -> tuple[CalibrationData, CalibrationData]:
        """`load` from seven eighths of a text, and evenly spread pieces of the other eighth to measure on.

        Raises:
            CalibrationError: as `load`.
        """
        text = _Text.read(source, tokenizer_folder)
        length = min(HELD_OUT_LENGTH, sequence_length)
        pieces = text.tokens[: len(text.tokens) // length * length].view(-1, length)
        count = min(HELD_OUT_TOKENS // length, max(1, len(pieces) // 8))
        rest = len(text.tokens) - count * length
        if rest < sequence_length:
            raise CalibrationError(
                f"{text.name}: leaves {max(0, rest)} tokens beside the {count * length} to measure on, fewer than one "
                f"sequence of {sequence_length} (--sequence-length, or --held-out with a text of its own)"
            )
        chosen = _spread(len(pieces), count)
        kept = torch.ones(len(text.tokens), dtype=torch.bool)
        kept[: pieces.numel()].view_as(pieces)[chosen] = False
        windows = _windows(text.tokens[kept], text.name, samples, sequence_length, seed)
        return text.data(windows), text.data(pieces[chosen])

    @classmethod
    def held_out(cls, source: str | Path, tokenizer_folder: Path, sequence_length: int) -> CalibrationData:
        """Evenly spread pieces of a text that is only measured on.

        Raises:
            CalibrationError: as `load`.
        """
        text = _Text.read(source, tokenizer_folder)
        length = min(HELD_OUT_LENGTH, sequence_length)
        pieces = text.tokens[: len(text.tokens) // length * length].view(-1, length)
        if not len(pieces):
            raise CalibrationError(f"{text.name}: holds {len(text.tokens)} tokens, fewer than one piece of {length}")
        return text.data(pieces[_spread(len(pieces), min(len(pieces), HELD_OUT_TOKENS // length))])


@dataclass(frozen=True)
class _Text:
    """A text as tokens [tokens] int64, documents behind each other."""

    tokens: torch.Tensor
    name: str
    sha256: str

    @classmethod
    def read(cls, source: str | Path, tokenizer_folder: Path) -> _Text:
        content, name = _read_source(source)
        tokenizer = _load_tokenizer(tokenizer_folder)
        separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream: list[int] = []
        for document in _documents(content, name, tokenizer):
            stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + separator
        return cls(torch.tensor(stream, dtype=torch.int64), name, hashlib.sha256(content).hexdigest())

    def data(self, tokens: torch.Tensor) -> CalibrationData:
        return CalibrationData(tokens, self.name, self.sha256)


def _windows(tokens: torch.Tensor, name: str, samples: int, sequence_length: int, seed: int) -> torch.Tensor:
    """Windows [samples, sequence_length] at random places of a text [tokens]."""
    if len(tokens) < sequence_length:
        raise CalibrationError(
            f"{name}: holds {len(tokens)} tokens, fewer than one sequence of {sequence_length} (--sequence-length)"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - sequence_length + 1, (samples,), generator=generator)
    return tokens[starts[:, None] + torch.arange(sequence_length)]


def _spread(length: int, count: int) -> list[int]:
    """`count` indices below `length` at even distances."""
    return [(2 * index + 1) * length // (2 * count) for index in range(count)]


def source_digest(source: str | Path) -> str:
    """SHA-256 of a calibration text as it is now, in hexadecimal.

    Raises:
        CalibrationError: an unreadable text.
    """
    return hashlib.sha256(_read_source(source)[0]).hexdigest()


def default_sequence_length(config: dict[str, Any]) -> int:
    """2048 as published, or the model's longest sequence if that is shorter."""
    return min(2048, int(config.get("max_position_embeddings") or 2048))


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"{folder}: no usable tokenizer ({str(error).splitlines()[0]})") from error


def _read_source(source: str | Path) -> tuple[bytes, str]:
    if str(source) == DEFAULT_TEXT:
        return files("deltaweave.converter").joinpath("data/calibration.txt").read_bytes(), DEFAULT_TEXT
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(f"{path}: a text must be .txt, .jsonl or `default` (or `none`, to calibrate on none)")
    try:
        return path.read_bytes(), path.name
    except OSError as error:
        raise CalibrationError(f"{path}: not readable ({error.strerror})") from error


def _documents(content: bytes, name: str, tokenizer: Any) -> list[str]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{name}: not UTF-8 at byte {error.start}") from error
    if not name.endswith(".jsonl"):
        return [text]
    return [
        _document(line, f"{name}:{number}", tokenizer)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _document(line: str, where: str, tokenizer: Any) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where}: not JSON ({error})") from error
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        if isinstance(entry.get("messages"), list):
            if not tokenizer.chat_template:
                raise CalibrationError(f"{where}: has messages, but the tokenizer has no chat template")
            return str(tokenizer.apply_chat_template(entry["messages"], tokenize=False))
        if isinstance(entry.get("prompt"), str) and isinstance(entry.get("answer"), str):
            return str(entry["prompt"]) + str(entry["answer"])
    raise CalibrationError(f"{where}: has neither `text`, nor `messages`, nor `prompt` and `answer`")
