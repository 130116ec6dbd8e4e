# SPDX-License-Identifier: Apache-2.0
"""Texts of many fine-tunes of one base in one batch: tokenizers, settings and an arena around the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from deltaweave.converter import Checkpoint, require_base, require_identity
from deltaweave.formats import (
    Delta,
    DeltaExpert,
    DeltaweaveError,
    Fusion,
    TokenGate,
    is_fusion,
    open_tenant,
    read_fusion,
)
from deltaweave.generation import PieceStreamer, encode_prompt
from deltaweave.models import load_checkpoint, load_tokenizer, side_files
from deltaweave.runtime_plugin.pytorch import Arena, Decoder, Request, Sampling, attach

__all__ = ["Prompt", "Text", "TextStream", "Voice", "generate_batch", "make_request", "require_tenants", "room_for"]

# Settings of a fine-tune that a batch does not follow, and the values at which they do nothing.
UNSERVED = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
}
SLOTS = 64
# What a record of a fusion takes beside its matrices, at most.
PART_BYTES = 4096
SPARE_BYTES = 64 << 20  # beside the tenants


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Attributes:
        text: or the user's turn of a chat.
        tenant: name of a fine-tune, or None for the base.
        temperature: 0 is greedy; None follows the tenant's own generation settings.
        top_p: None as well.
        seed: of sampling.
    """

    text: str
    tenant: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """What came of a prompt.

    Attributes:
        tenant: as in the prompt.
        prompt: its text.
        text: the continuation.
        tokens: number of new tokens.
        finish_reason: the tenant's stop token came, or the most tokens were there.
    """

    tenant: str | None
    prompt: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Voice:
    """How a tenant, or the base, reads and writes."""

    tokenizer: Any
    settings: GenerationConfig

    def stop(self) -> frozenset[int]:
        """Tokens that end its texts."""
        found = self.settings.eos_token_id
        found = self.tokenizer.eos_token_id if found is None else found
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    def sampling(self, prompt: Prompt) -> Sampling:
        """How a prompt's tokens are chosen: as it says, else as the tenant's own settings do."""
        own = self.settings
        temperature = prompt.temperature
        if temperature is None:
            temperature = _or(own.temperature, 1.0) if own.do_sample else 0.0
        return Sampling(
            temperature=temperature,
            top_p=_or(own.top_p, 1.0) if prompt.top_p is None else prompt.top_p,
            top_k=_or(own.top_k, 50),
            repetition_penalty=_or(own.repetition_penalty, 1.0),
            seed=prompt.seed,
        )


def generate_batch(
    base: str | Path,
    tenants: Mapping[str, str | Path],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    max_batch: int = 32,
    arena_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    accept_base: bool = False,
    write: Callable[[int, str], None] | None = None,
) -> list[Text]:
    """Continues prompts, each with its own fine-tune, in batches that mix them.

    Args:
        base: Hugging Face folder of the base.
        tenants: delta or fusion files by the names that prompts use; a delta's tokenizer, chat template, stop tokens
            and generation settings are followed, a fusion has the base's.
        prompts: what to continue.
        max_new_tokens: at most so many for each.
        chat: wrap the prompts in their tenants' chat templates.
        max_batch: prompts at work at a time; the others wait.
        arena_bytes: device memory for tenants; None for what the files suggest. If they do not fit together, the least
            recently used ones wait in host memory.
        dtype: of the base's weights; None for bfloat16 on a GPU (or float16, if the base has it) and float32 elsewhere.
        device: None takes the GPU if there is one.
        accept_base: take a base whose fingerprint is not the files'.
        write: is handed the texts piece by piece: (index of the prompt, piece).

    Returns:
        In the order of the prompts.

    Raises:
        DeltaweaveError: another base, an unknown tenant, no usable tokenizer or chat template, an empty prompt, a
            generation setting that batches do not follow.
    """
    require_tenants(prompts, tenants)
    home = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = Checkpoint.open(base)
    model = load_checkpoint(base, dtype or _weight_dtype(checkpoint, home)).to(home)
    arena = Arena.for_model(model, capacity_bytes=arena_bytes or _room_for_files(tenants.values()), slots=SLOTS)
    voices: dict[str | None, Voice] = {}
    if any(prompt.tenant is None for prompt in prompts):
        voices[None] = Voice(load_tokenizer(base), model.generation_config)
    for name, path in tenants.items():
        if is_fusion(path):
            require_identity(checkpoint, read_fusion(path).base, path, accept=accept_base)
            arena.add(path, name, accept_base=True)
            voices[name] = voices.get(None) or Voice(load_tokenizer(base), model.generation_config)
            continue
        with Delta.open(path) as delta, side_files(checkpoint, delta) as folder:
            require_base(checkpoint, delta, accept=accept_base)
            tenant = arena.add(delta, name, accept_base=True)
            voices[name] = Voice(load_tokenizer(folder), tenant.generation or model.generation_config)
    return _run(model, arena, voices, prompts, max_new_tokens, chat, max_batch, write)


def require_tenants(prompts: Sequence[Prompt], tenants: Mapping[str, str | Path]) -> None:
    """Refuses prompts of unknown tenants."""
    for prompt in prompts:
        if prompt.tenant is not None and prompt.tenant not in tenants:
            raise DeltaweaveError(f"no tenant {prompt.tenant!r}; there are {', '.join(sorted(tenants)) or 'none'}")


def _run(
    model: Any,
    arena: Arena,
    voices: Mapping[str | None, Voice],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    chat: bool,
    max_batch: int,
    write: Callable[[int, str], None] | None,
) -> list[Text]:
    requests = [make_request(prompt, voices[prompt.tenant], max_new_tokens, chat) for prompt in prompts]
    streams = [TextStream(index, voices[prompt.tenant].tokenizer, write) for index, prompt in enumerate(prompts)]
    longest = max((len(request.tokens) for request in requests), default=1) + max_new_tokens
    rows = max(1, min(max_batch, len(prompts)))
    with attach(model, arena) as attachment, Decoder(model, attachment, max_batch=rows, max_length=longest) as decoder:
        completions = decoder.run(requests, lambda index, token: streams[index].put(token))
    return [
        Text(prompt.tenant, prompt.text, stream.end(), len(completion.tokens), completion.finish_reason)
        for prompt, stream, completion in zip(prompts, streams, completions, strict=True)
    ]


class TextStream:
    """The text of one prompt as its tokens come."""

    def __init__(self, index: int, tokenizer: Any, write: Callable[[int, str], None] | None) -> None:
        """`write` is handed (index, piece)."""
        self._pieces: list[str] = []

        def collect(piece: str) -> None:
            self._pieces.append(piece)
            if write and piece:
                write(index, piece)

        self._streamer = PieceStreamer(tokenizer, collect, skip_prompt=False)

    def put(self, token: int) -> None:
        """Another token."""
        self._streamer.put(torch.tensor([token]))

    def end(self) -> str:
        """The whole text."""
        self._streamer.end()
        return "".join(self._pieces)


def make_request(prompt: Prompt, voice: Voice, max_new_tokens: int, chat: bool) -> Request:
    """What a host is asked for a prompt.

    Raises:
        DeltaweaveError: a generation setting that batches do not follow, no chat template, an empty prompt.
    """
    for name, neutral in UNSERVED.items():
        value = getattr(voice.settings, name, None)
        if value is not None and value != neutral:
            raise DeltaweaveError(
                f"tenant {prompt.tenant or 'base'}: its generation setting {name} = {value} is not followed in a batch"
            )
    return Request(
        tokens=encode_prompt(voice.tokenizer, prompt.text, chat),
        tenant=prompt.tenant,
        max_new_tokens=max_new_tokens,
        stop=voice.stop(),
        sampling=voice.sampling(prompt),
    )


def room_for(*tenants: Delta | Fusion) -> int:
    """Arena bytes for them: kernel order takes little more than the file, and tiny records up to twice as much."""
    sizes = (_fusion_bytes(tenant) if isinstance(tenant, Fusion) else 2 * tenant.size for tenant in tenants)
    return SPARE_BYTES + sum(sizes)


def _room_for_files(paths: Iterable[str | Path]) -> int:
    total = 0
    for path in paths:
        with open_tenant(path) as tenant:
            total += room_for(tenant)
    return total


def _fusion_bytes(fusion: Fusion) -> int:
    """Room for a fusion: ranks in blocks of 16 and features in groups of 128, 16 bits; gates in 32."""
    total = sum(2 * expert.delta.size for expert in fusion.experts if isinstance(expert, DeltaExpert))
    for lora in fusion.loras:
        for matrix in lora.modules.values():
            total += PART_BYTES + 2 * (matrix.rank + 15) * (sum(matrix.shape) + 2 * 128)
    if isinstance(fusion.gate, TokenGate):
        total += sum(PART_BYTES + 4 * block.weight.data.size for block in fusion.gate.blocks.values())
    return total


def _weight_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    dtypes = {checkpoint.dtype(name) for name in checkpoint.names}
    return torch.float16 if dtypes == {torch.float16} else torch.bfloat16


def _or(value: Any, default: Any) -> Any:
    """Transformers leaves settings that nobody set at None."""
    return default if value is None else value
