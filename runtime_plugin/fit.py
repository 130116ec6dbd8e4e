# SPDX-License-Identifier: Apache-2.0
"""What a delta carries beside records, and whether its model computes as the base's does. No torch."""

from __future__ import annotations

import json
from typing import Any

from deltaweave.formats import Delta, DeltaweaveError
from transformers import GenerationConfig, PretrainedConfig

__all__ = [
    "LENGTH_DEPENDENT",
    "AttachError",
    "generation_settings",
    "is_vocabulary",
    "require_vocabulary",
    "tuned_config",
]

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
    "rope_parameters",  # served: see pytorch.fit.rotary_embedding and trt.rotary
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
}
# Rotary embeddings that follow the length of the text: they cannot be looked up by slot.
LENGTH_DEPENDENT = {"dynamic", "longrope"}


class AttachError(DeltaweaveError, ValueError):
    """A delta that does not fit the model it is attached to."""


def tuned_config(base: PretrainedConfig, delta: Delta) -> PretrainedConfig:
    """The fine-tune's configuration; the base's own if the delta brings none.

    Raises:
        AttachError: of another family, or with a decoder that computes otherwise than the base's.
    """
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
