# SPDX-License-Identifier: Apache-2.0
"""One delta on a Hugging Face model through the reference op: the whole fine-tune, without dense weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from deltaweave.formats import (
    BaseIdentity,
    BaseRecord,
    Delta,
    DeltaweaveError,
    Record,
    ReplaceRecord,
    tensor_digest,
)
from deltaweave.runtime_plugin.pytorch.modules import MatrixRecord, TunedEmbedding, TunedLinear, shared_linear
from deltaweave.runtime_plugin.pytorch.packed import exact_tensor
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

__all__ = ["AttachError", "Attachment", "attach"]

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
    "rope_parameters",  # served: see _rotary_swap
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
}


class AttachError(DeltaweaveError, ValueError):
    """A delta that does not fit the model it is attached to."""


class Attachment:
    """A delta on a model; `detach` (or leaving the `with` block) gives back the very objects that were there."""

    def __init__(self, swaps: list[_Swap]) -> None:
        """Carries out the swaps; use `attach`."""
        self._undo: list[_Swap] = []
        for swap in swaps:
            self._undo.append(_Swap(swap.owner, swap.name, getattr(swap.owner, swap.name)))
            setattr(swap.owner, swap.name, swap.value)

    def detach(self) -> None:
        """Restores the base, in reverse order; a second call does nothing."""
        while self._undo:
            swap = self._undo.pop()
            setattr(swap.owner, swap.name, swap.value)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@dataclass(frozen=True)
class _Swap:
    """An attribute of a module or configuration, and the value it is to take."""

    owner: Any
    name: str
    value: Any


def attach(model: nn.Module, delta: Delta, *, accept_base: bool = False) -> Attachment:
    """Makes a base model compute its fine-tune.

    Projections, norms, biases, embeddings, lm_head, rotary embeddings and generation settings all follow the delta; the
    base's weights are left as they are. Put the model on its device first.

    Args:
        model: a Hugging Face causal language model holding the base's weights.
        delta: opened; may be closed afterwards.
        accept_base: do not compare the model's weights with the base that the delta was made from (needed for casts
            that lose bits, and for quantized bases).

    Returns:
        The attachment, whose `detach` restores the base.

    Raises:
        AttachError: another base; a parameter that the model lacks, or has in another shape; a setting of the fine-tune
            that the model cannot follow.
    """
    swaps = [*_setting_swaps(model, delta), *_record_swaps(model, delta), *_untied_swaps(model, delta)]
    if not accept_base:
        _require_base(model, delta.header.base)
    return Attachment(swaps)


def _record_swaps(model: nn.Module, delta: Delta) -> Iterator[_Swap]:
    for name, record in delta.records():
        yield _swap(model, name, record)
        for alias in _aliases(delta, name):
            yield _alias_swap(model, name, alias, record)


def _untied_swaps(model: nn.Module, delta: Delta) -> Iterator[_Swap]:
    """Parameters that are tied in the fine-tune alone, and have no record: they take the base's other one."""
    for alias, owner in delta.header.architecture.tied.items():
        weight = _parameter(model, owner)
        if owner not in delta.names and weight is not _parameter(model, alias):
            yield _alias_swap(model, owner, alias, BaseRecord(tuple(weight.shape)))


def _swap(model: nn.Module, name: str, record: Record) -> _Swap:
    """What a record changes: a parameter's values, or the module around a matrix."""
    module = _module(model, name)
    if isinstance(record, ReplaceRecord):
        return _Swap(module, name.rpartition(".")[2], _replacement(module, name, record))
    return _module_swap(model, name, _tuned_module(module, name, record))


def _alias_swap(model: nn.Module, owner: str, alias: str, record: Record) -> _Swap:
    """The same change for a parameter that shares the owner's storage: a tied lm_head."""
    weight = _parameter(model, owner)
    if isinstance(record, ReplaceRecord):
        return _module_swap(model, alias, shared_linear(_replacement(_module(model, owner), owner, record)))
    _require_shape(alias, tuple(weight.shape), record)
    return _module_swap(model, alias, TunedLinear(shared_linear(weight), record))


def _module_swap(model: nn.Module, name: str, module: nn.Module) -> _Swap:
    parent, _, child = name.removesuffix(".weight").rpartition(".")
    return _Swap(model.get_submodule(parent), child, module)


def _tuned_module(module: nn.Module, name: str, record: MatrixRecord) -> nn.Module:
    if isinstance(module, nn.Linear):
        _require_shape(name, (module.out_features, module.in_features), record)
        return TunedLinear(module, record)
    if isinstance(module, nn.Embedding):
        _require_shape(name, (module.num_embeddings, module.embedding_dim), record)
        return TunedEmbedding(module, record)
    raise AttachError(f"{name}: the model has a {type(module).__name__} there, expected a linear layer or an embedding")


def _replacement(module: nn.Module, name: str, record: ReplaceRecord) -> nn.Parameter:
    """New values for a parameter; a bias may come where the layer had none."""
    before: torch.Tensor | None = getattr(module, name.rpartition(".")[2])
    likeness: torch.Tensor = module.get_parameter("weight") if before is None else before
    shape = likeness.shape[:1] if before is None else likeness.shape
    if tuple(shape) != record.shape:
        raise AttachError(f"{name}: the model has shape {list(shape)}, the delta {list(record.shape)}")
    return nn.Parameter(exact_tensor(record.values).to(likeness, copy=True), requires_grad=False)


def _require_shape(name: str, shape: tuple[int, ...], record: MatrixRecord) -> None:
    """Vocabularies may grow and shrink; everything else has the base's shape."""
    if shape[1:] != record.shape[1:] or (shape != record.shape and not _is_vocabulary(name)):
        raise AttachError(f"{name}: the model has shape {list(shape)}, the delta {list(record.shape)}")


def _is_vocabulary(name: str) -> bool:
    """Whether a parameter has a row per token."""
    return name.endswith("embed_tokens.weight") or name == "lm_head.weight"


def _module(model: nn.Module, name: str) -> nn.Module:
    """The module that has a parameter, or has a place for it."""
    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError as error:
        raise AttachError(f"{name}: the model has no module {module_name}") from error
    if isinstance(module, (TunedLinear, TunedEmbedding)):
        raise AttachError("the model has a delta attached already; detach it first")
    if leaf not in module._parameters:
        raise AttachError(f"{name}: the model's {module_name} has no {leaf}")
    return module


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    parameter: nn.Parameter = getattr(_module(model, name), name.rpartition(".")[2])
    return parameter


def _aliases(delta: Delta, owner: str) -> list[str]:
    return [alias for alias, name in delta.header.architecture.tied.items() if name == owner]


def _setting_swaps(model: nn.Module, delta: Delta) -> Iterator[_Swap]:
    """Vocabulary size, rotary embeddings and generation settings, where the fine-tune brings its own."""
    base: PretrainedConfig = model.config
    if base.model_type != delta.header.architecture.model_type:
        raise AttachError(f"the model is a {base.model_type}, the delta is of a {delta.header.architecture.model_type}")
    tuned = _tuned_config(base, delta)
    _require_same_settings(base, tuned)
    for name, record in delta.records():
        if _is_vocabulary(name) and record.shape[0] != tuned.vocab_size:
            raise AttachError(f"{name}: the delta has {record.shape[0]} rows for a vocabulary of {tuned.vocab_size}")
    yield _Swap(base, "vocab_size", tuned.vocab_size)
    if tuned.rope_parameters != base.rope_parameters:
        yield _rotary_swap(model, tuned)
    generation = _carried_json(delta, "generation_config.json")
    if generation is not None and hasattr(model, "generation_config"):
        yield _Swap(model, "generation_config", GenerationConfig.from_dict(generation))


def _tuned_config(base: PretrainedConfig, delta: Delta) -> PretrainedConfig:
    config = _carried_json(delta, "config.json")
    if config is None:
        return base
    try:
        return type(base).from_dict(config)
    except Exception as error:  # whatever Transformers makes of values that are none
        raise AttachError(f"{delta.path}: carried file config.json is unusable ({_first_line(error)})") from error


def _require_same_settings(base: PretrainedConfig, tuned: PretrainedConfig) -> None:
    """Refuses a fine-tune whose decoder computes otherwise; settings of no decoder are of no interest."""
    settings = set(type(base)().to_dict()) - set(PretrainedConfig().to_dict()) - FREE_SETTINGS
    for name in sorted(settings):
        before, after = getattr(base, name), getattr(tuned, name)
        if before != after:
            raise AttachError(f"config.json: the model has {name} {before}, the delta {after}")


def _rotary_swap(model: nn.Module, tuned: PretrainedConfig) -> _Swap:
    decoder = model.get_submodule("model")
    kind: Any = type(decoder.get_submodule("rotary_emb"))
    try:
        rotary = kind(config=tuned)
    except Exception as error:  # as in _tuned_config
        raise AttachError(f"config.json: unusable rope_parameters of the delta ({_first_line(error)})") from error
    return _Swap(decoder, "rotary_emb", rotary.to(next(model.parameters()).device))


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


def _require_base(model: nn.Module, base: BaseIdentity) -> None:
    """Compares the smallest tensors with the base's digests; a lossless cast passes."""
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
