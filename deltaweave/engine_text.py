# SPDX-License-Identifier: Apache-2.0
"""Texts of many fine-tunes from an engine folder: tokenizers and settings around the runner."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig

from deltaweave.converter.packaging import CARRIED_FILES
from deltaweave.formats import Delta, Fusion, open_tenant
from deltaweave.models import load_tokenizer
from deltaweave.runtime_plugin.trt.engine import Engine
from deltaweave.serving import Prompt, Text, TextStream, Voice, make_request, require_tenants

__all__ = ["generate_with_engine"]


def generate_with_engine(
    folder: str | Path,
    tenants: Mapping[str, str | Path],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    arena_bytes: int | None = None,
    accept_base: bool = False,
    write: Callable[[int, str], None] | None = None,
) -> list[Text]:
    """Continues prompts, each with its own fine-tune, in batches that mix them.

    Args:
        folder: that `deltaweave build` wrote.
        tenants: delta and fusion files by the names that prompts use; tokenizers, chat templates, stop tokens and
            generation settings of deltas are followed.
        prompts: what to continue.
        max_new_tokens: at most so many for each.
        chat: wrap the prompts in their tenants' chat templates.
        arena_bytes: device memory for tenants; None for what the engine was built for.
        accept_base: take deltas of another base.
        write: is handed the texts piece by piece: (index of the prompt, piece).

    Returns:
        In the order of the prompts.

    Raises:
        DeltaweaveError: an engine that does not fit this machine, another base, an unknown tenant, no usable tokenizer
            or chat template, an empty prompt, a generation setting that batches do not follow.
    """
    require_tenants(prompts, tenants)
    with Engine(folder, arena_bytes=arena_bytes) as engine:
        settings = _base_settings(Path(folder))
        voices: dict[str | None, Voice] = {}
        if any(prompt.tenant is None for prompt in prompts):
            voices[None] = Voice(load_tokenizer(folder), settings)
        for name, path in tenants.items():
            with open_tenant(path) as source, _side_files(Path(folder), source) as side:
                tenant = engine.add(source, name, accept_base=accept_base)
                voices[name] = Voice(load_tokenizer(side), tenant.generation or settings)
        requests = [make_request(prompt, voices[prompt.tenant], max_new_tokens, chat) for prompt in prompts]
        streams = [TextStream(index, voices[prompt.tenant].tokenizer, write) for index, prompt in enumerate(prompts)]
        completions = engine.run(requests, lambda index, token: streams[index].put(token))
    return [
        Text(prompt.tenant, prompt.text, stream.end(), len(completion.tokens), completion.finish_reason)
        for prompt, stream, completion in zip(prompts, streams, completions, strict=True)
    ]


def _base_settings(folder: Path) -> GenerationConfig:
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def _side_files(engine: Path, source: Delta | Fusion) -> Iterator[Path]:
    """A temporary folder with the base's tokenizer files from the engine folder; a delta's own win."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in CARRIED_FILES:
            if (engine / file).is_file():
                shutil.copyfile(engine / file, folder / file)
        if isinstance(source, Delta):
            for file in source.header.files:
                (folder / file).write_bytes(source.file(file))
        yield folder
