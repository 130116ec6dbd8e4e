# SPDX-License-Identifier: Apache-2.0
"""Text from base + delta, streamed, without dense weights: the delta is attached to the base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from deltaweave.converter import Checkpoint, require_base, require_identity
from deltaweave.formats import Delta, DeltaweaveError, open_tenant
from deltaweave.models import load_checkpoint, load_tokenizer, side_files
from deltaweave.runtime_plugin.pytorch import attach

__all__ = ["PieceStreamer", "encode_prompt", "generate"]


class PieceStreamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Hands every finished piece of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], *, skip_prompt: bool = True) -> None:
        """`skip_prompt`: the first tokens that come are the prompt's, and no text."""
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate(
    base: str | Path,
    delta: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    seed: int = 0,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    accept_base: bool = False,
    write: Callable[[str], None] | None = None,
) -> str:
    """Continues a prompt with base + delta, or with a fusion on the base.

    Args:
        base: Hugging Face folder of the base.
        delta: the file; a delta's tokenizer, chat template and generation settings are used.
        prompt: the text to continue, or the user's turn of a chat.
        max_new_tokens: at most so many.
        temperature: 0 is greedy; None follows the fine-tune's own generation settings.
        seed: of sampling.
        chat: wrap the prompt in the chat template.
        dtype: of the base's weights.
        device: None takes the GPU if there is one.
        accept_base: take a base whose fingerprint is not the delta's.
        write: is handed the text piece by piece.

    Returns:
        The whole new text.

    Raises:
        DeltaweaveError: another base, no usable tokenizer, no chat template where one is asked for, an empty prompt.
    """
    checkpoint = Checkpoint.open(base)
    with ExitStack() as stack:
        opened = stack.enter_context(open_tenant(delta))
        if isinstance(opened, Delta):
            require_base(checkpoint, opened, accept=accept_base)
            folder = stack.enter_context(side_files(checkpoint, opened))
        else:
            require_identity(checkpoint, opened.base, delta, accept=accept_base)
            folder = checkpoint.folder
        tokenizer = load_tokenizer(folder)
        model = load_checkpoint(base, dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokens = torch.tensor([encode_prompt(tokenizer, prompt, chat)], device=model.device)
        torch.manual_seed(seed)
        pieces: list[str] = []

        def collect(piece: str) -> None:
            pieces.append(piece)
            if write:
                write(piece)

        with attach(model, opened, accept_base=True), torch.no_grad():  # the base was checked above
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=PieceStreamer(tokenizer, collect),
                **_settings(model.generation_config, tokenizer, max_new_tokens, temperature),
            )
    return "".join(pieces)


def _settings(own: GenerationConfig, tokenizer: Any, max_new_tokens: int, temperature: float | None) -> dict[str, Any]:
    """What is asked beyond the fine-tune's own settings, and what those leave open."""
    end = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": pad}
    if temperature is not None:
        settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
    return settings


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens, wrapped in the chat template if asked for.

    Raises:
        DeltaweaveError: no chat template, or a prompt without tokens.
    """
    if chat and not tokenizer.chat_template:
        raise DeltaweaveError("the fine-tune's tokenizer has no chat template; leave out --chat")
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DeltaweaveError(f"--prompt {prompt!r}: the prompt holds no tokens")
    return list(ids)
