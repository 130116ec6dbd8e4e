# SPDX-License-Identifier: Apache-2.0
"""Whether a delta fits a model: the same family and settings, and the base that it was made from."""

from __future__ import annotations

import json
from typing import Any

import torch
from deltaweave.formats import BaseIdentity, Delta, DeltaweaveError, tensor_digest
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

__all__ = [
    "AttachError",
    "generation_settings",
    "is_vocabulary",
    "require_base",
    "require_vocabulary",
    "rotary_embedding",
    "tuned_config",
]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of the base's smallest tensors that are compared with the delta's digests: a tenth of a second.
CHECKED_BYTES = 1 << 26
# Settings of a decoder that may differ between base and fine-tune: they steer training and generation, or repeat what
# other settings and the tensors say.
FREE_SETTINGS = {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "pad_token_id",
    "pretraining_tp",
    "rope_parameters",  # served: see rotary_embedding
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
}


class AttachError(DeltaweaveError, ValueError):
    """A delta that does not fit the model it is attached to."""


def tuned_config(model: nn.Module, delta: Delta) -> PretrainedConfig:
    """The fine-tune's configuration; the base's own if the delta brings none.

    Raises:
        AttachError: of another family, or with a decoder that computes otherwise than the model's.
    """
    base: PretrainedConfig = model.config
    if base.model_type != delta.header.architecture.model_type:
        raise AttachError(f"the model is a {base.model_type}, the delta is of a {delta.header.architecture.model_type}")
    config = _carried_json(delta, "config.json")
    if config is None:
        return base
    try:
        tuned = type(base).from_dict(config)
    except Exception as error:  # whatever Transformers makes of values that are none
        raise AttachError(f"{delta.path}: carried file config.json is unusable ({_first_line(error)})") from error
    _require_same_settings(base, tuned)
    return tuned


def generation_settings(delta: Delta) -> GenerationConfig | None:
    """The fine-tune's own generation settings, if the delta brings them."""
    settings = _carried_json(delta, "generation_config.json")
    return None if settings is None else GenerationConfig.from_dict(settings)


def rotary_embedding(base: nn.Module, tuned: PretrainedConfig) -> nn.Module:
    """A model's rotary embedding as the fine-tune's configuration has it, on the same device.

    Raises:
        AttachError: parameters that Transformers cannot use.
    """
    kind: Any = type(base)
    try:
        rotary: nn.Module = kind(config=tuned)
    except Exception as error:  # as in tuned_config
        raise AttachError(f"config.json: unusable rope_parameters of the delta ({_first_line(error)})") from error
    return rotary.to(next(base.buffers()).device)


def require_vocabulary(delta: Delta, tuned: PretrainedConfig) -> None:
    """Refuses matrices with another number of rows than the fine-tune has tokens."""
    for name in delta.names:
        if not is_vocabulary(name):
            continue
        rows = delta.record(name).shape[0]
        if rows != tuned.vocab_size:
            raise AttachError(f"{name}: the delta has {rows} rows for a vocabulary of {tuned.vocab_size}")


def is_vocabulary(name: str) -> bool:
    """Whether a parameter has a row per token."""
    return name.endswith("embed_tokens.weight") or name == "lm_head.weight"


def require_base(model: nn.Module, base: BaseIdentity) -> None:
    """Compares the smallest tensors with the base's digests; a lossless cast passes.

    Raises:
        AttachError: a tensor of other values.
    """
    state, left = model.state_dict(), CHECKED_BYTES
    for name, entry in sorted(base.tensors.items(), key=lambda item: (torch.Size(item[1].shape).numel(), item[0])):
        tensor = state.get(name)
        if tensor is None or entry.dtype not in DTYPES or tuple(tensor.shape) != entry.shape:
            continue
        stored = tensor.to(DTYPES[entry.dtype]).contiguous().cpu()
        left -= stored.nbytes
        if left < 0:
            return
        if tensor_digest(stored.view(-1).view(torch.uint8).numpy().data) != entry.sha256:
            raise AttachError(
                f"{name}: the model's values are not those of the base that the delta was made from ({base.name}, root "
                f"{base.root[:12]}); accept_base takes them all the same"
            )


def _require_same_settings(base: PretrainedConfig, tuned: PretrainedConfig) -> None:
    """Refuses a fine-tune whose decoder computes otherwise; settings of no decoder are of no interest."""
    settings = set(type(base)().to_dict()) - set(PretrainedConfig().to_dict()) - FREE_SETTINGS
    for name in sorted(settings):
        before, after = getattr(base, name), getattr(tuned, name)
        if before != after:
            raise AttachError(f"config.json: the model has {name} {before}, the delta {after}")


def _carried_json(delta: Delta, name: str) -> dict[str, Any] | None:
    if name not in delta.header.files:
        return None
    try:
        content = json.loads(delta.file(name))
    except ValueError as error:
        raise AttachError(f"{delta.path}: carried file {name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise AttachError(f"{delta.path}: carried file {name} holds {type(content).__name__}, expected an object")
    return content


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
