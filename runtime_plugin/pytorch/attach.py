# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes on a Hugging Face model: one delta through the reference op, or an arena; the whole fine-tune."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from deltaweave.formats import BaseRecord, Delta, Fusion, Record, ReplaceRecord
from deltaweave.runtime_plugin.fit import (
    AttachError,
    generation_settings,
    is_vocabulary,
    require_vocabulary,
    tuned_config,
)
from deltaweave.runtime_plugin.pytorch.arena import Arena
from deltaweave.runtime_plugin.pytorch.fit import require_base, rotary_embedding
from deltaweave.runtime_plugin.pytorch.fusion import attach_fusion
from deltaweave.runtime_plugin.pytorch.modules import MatrixRecord, TunedEmbedding, TunedLinear, shared_linear
from deltaweave.runtime_plugin.pytorch.packed import exact_tensor
from deltaweave.runtime_plugin.pytorch.serve import ServingAttachment, serve
from deltaweave.runtime_plugin.pytorch.swaps import Attachment, Swap
from torch import nn
from transformers import PretrainedConfig

__all__ = ["AttachError", "Attachment", "attach"]


@overload
def attach(model: nn.Module, source: Delta, *, accept_base: bool = False) -> Attachment: ...


@overload
def attach(model: nn.Module, source: Fusion, *, accept_base: bool = False) -> Attachment: ...


@overload
def attach(model: nn.Module, source: Arena) -> ServingAttachment: ...


def attach(model: nn.Module, source: Delta | Fusion | Arena, *, accept_base: bool = False) -> Attachment:
    """Makes a base model compute one fine-tune, one fusion, or those of an arena.

    One delta or fusion is computed by the reference ops and holds for the whole batch; a fusion may be attached over a
    delta, and then adds to the fine-tune's layers. With an arena every row of a batch has its
    own tenant (`ServingAttachment.step` says which) and, on a GPU, libdeltaweave's kernels do the work.

    Projections, norms, biases, embeddings, lm_head, rotary embeddings and, of one delta, generation settings all follow
    the fine-tune; the base's weights are left as they are. Put the model on its device first.

    Args:
        model: a Hugging Face causal language model holding the base's weights.
        source: a delta that is open (and may be closed afterwards), a fusion (`resolve_fusion`), or an arena that was
            made for this model.
        accept_base: do not compare the model's weights with the base that the delta was made from (needed for casts
            that lose bits, and for quantized bases). An arena's tenants were checked when they were added.

    Returns:
        The attachment, whose `detach` restores the base.

    Raises:
        AttachError: another base; a parameter that the model lacks, or has in another shape; a setting of the fine-tune
            that the model cannot follow; an arena of another model.
    """
    if isinstance(source, Arena):
        return serve(model, source)
    if isinstance(source, Fusion):
        return attach_fusion(model, source, accept_base=accept_base)
    return _attach_delta(model, source, accept_base)


def _attach_delta(model: nn.Module, delta: Delta, accept_base: bool) -> Attachment:
    swaps = [*_setting_swaps(model, delta), *_record_swaps(model, delta), *_untied_swaps(model, delta)]
    if not accept_base:
        require_base(model.state_dict().get, delta.header.base)
    return Attachment(swaps)


def _record_swaps(model: nn.Module, delta: Delta) -> Iterator[Swap]:
    for name, record in delta.records():
        yield _swap(model, name, record)
        for alias in _aliases(delta, name):
            yield _alias_swap(model, name, alias, record)


def _untied_swaps(model: nn.Module, delta: Delta) -> Iterator[Swap]:
    """Parameters that are tied in the fine-tune alone, and have no record: they take the base's other one."""
    for alias, owner in delta.header.architecture.tied.items():
        weight = _parameter(model, owner)
        if owner not in delta.names and weight is not _parameter(model, alias):
            yield _alias_swap(model, owner, alias, BaseRecord(tuple(weight.shape)))


def _swap(model: nn.Module, name: str, record: Record) -> Swap:
    """What a record changes: a parameter's values, or the module around a matrix."""
    module = _module(model, name)
    if isinstance(record, ReplaceRecord):
        return Swap(module, name.rpartition(".")[2], _replacement(module, name, record))
    return _module_swap(model, name, _tuned_module(module, name, record))


def _alias_swap(model: nn.Module, owner: str, alias: str, record: Record) -> Swap:
    """The same change for a parameter that shares the owner's storage: a tied lm_head."""
    weight = _parameter(model, owner)
    if isinstance(record, ReplaceRecord):
        return _module_swap(model, alias, shared_linear(_replacement(_module(model, owner), owner, record)))
    _require_shape(alias, tuple(weight.shape), record)
    return _module_swap(model, alias, TunedLinear(shared_linear(weight), record))


def _module_swap(model: nn.Module, name: str, module: nn.Module) -> Swap:
    parent, _, child = name.removesuffix(".weight").rpartition(".")
    return Swap(model.get_submodule(parent), child, module)


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
    if shape[1:] != record.shape[1:] or (shape != record.shape and not is_vocabulary(name)):
        raise AttachError(f"{name}: the model has shape {list(shape)}, the delta {list(record.shape)}")


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


def _setting_swaps(model: nn.Module, delta: Delta) -> Iterator[Swap]:
    """Vocabulary size, rotary embeddings and generation settings, where the fine-tune brings its own."""
    base: PretrainedConfig = model.config
    tuned = tuned_config(model.config, delta)
    require_vocabulary(delta, tuned)
    yield Swap(base, "vocab_size", tuned.vocab_size)
    if tuned.rope_parameters != base.rope_parameters:
        decoder = model.get_submodule("model")
        yield Swap(decoder, "rotary_emb", rotary_embedding(decoder.get_submodule("rotary_emb"), tuned))
    generation = generation_settings(delta)
    if generation is not None and hasattr(model, "generation_config"):
        yield Swap(model, "generation_config", generation)
