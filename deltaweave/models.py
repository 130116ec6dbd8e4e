# SPDX-License-Identifier: Apache-2.0
"""Models in memory: a checkpoint, or base + delta as dense weights, and the tokenizer that belongs to each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from deltaweave.converter import Checkpoint, tuned_names, tuned_tensor, write_side_files
from deltaweave.formats import Delta, DeltaweaveError

# Loading takes seconds at most, and callers have progress bars of their own.
disable_progress_bar()

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

__all__ = ["load_checkpoint", "load_tokenizer", "load_tuned", "side_files"]


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype = torch.float32, vocabulary: int | None = None
) -> PreTrainedModel:
    """A checkpoint as a model in evaluation mode.

    Args:
        folder: Hugging Face folder.
        dtype: of the weights in memory.
        vocabulary: if given, tokens beyond it are dropped and missing ones get rows of zeros, as in a delta that
            leaves the base's embeddings alone.

    Raises:
        DeltaweaveError: a folder that Transformers cannot load.
    """
    with _explained(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    known = int(model.config.vocab_size)
    if vocabulary is not None and vocabulary != known:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:] = 0
    return model.eval()


def load_tuned(base: Checkpoint, delta: Delta, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Base + delta as a dense model in evaluation mode; takes the memory of one model.

    Raises:
        DeltaweaveError: a delta whose settings Transformers cannot load.
    """
    state = {name: tuned_tensor(base, delta, name) for name in tuned_names(base, delta)}
    with side_files(base, delta) as folder, _explained(delta.path):
        config = AutoConfig.from_pretrained(folder)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        DeltaweaveError: the folder has none that works.
    """
    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise DeltaweaveError(f"{folder}: has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    with _explained(f"{folder}: tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Transformers raises many things at files that it cannot use; a user needs the file's name and the reason."""
    try:
        yield
    except (DeltaweaveError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DeltaweaveError(f"{name}: Transformers cannot load it ({reason})") from error


@contextmanager
def side_files(base: Checkpoint, delta: Delta) -> Iterator[Path]:
    """A temporary folder with everything of base + delta but its weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_side_files(base, delta, Path(folder))
        yield Path(folder)
