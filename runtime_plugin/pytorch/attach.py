# SPDX-License-Identifier: Apache-2.0
"""One delta on a Hugging Face model through the reference op: the whole fine-tune, without dense weights."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from deltaweave.formats import BaseRecord, DeltaweaveError, DenseRecord, Delta, ExactArray, FactoredRecord
from deltaweave.formats import Record, ReplaceRecord, RowsRecord
from deltaweave.runtime_plugin.pytorch.packed import DenseDelta, FactoredDelta
from deltaweave.runtime_plugin.pytorch.reference import delta_linear, delta_rows, dense_linear

__all__ = ["AttachError", "Attachment", "attach"]


class AttachError(DeltaweaveError, ValueError):
    """A delta that does not fit the model it is attached to."""


class Attachment:
    """A delta on a model; `detach` (or leaving the `with` block) gives back the very modules that were there."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing attached yet; `attach` fills it."""
        self.model = model
        self._undo: list[Callable[[], None]] = []

    def detach(self) -> None:
        """Restores the base, in reverse order; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def replace_module(self, name: str, module: nn.Module) -> None:
        """Puts a module in another one's place until `detach`."""
        before = self.model.get_submodule(name)
        self.model.set_submodule(name, module)
        self._undo.append(lambda: self.model.set_submodule(name, before))

    def replace_parameter(self, name: str, values: torch.Tensor) -> None:
        """Gives a module another parameter until `detach`; a bias may come where none was."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        before = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
        self._undo.append(lambda: setattr(owner, leaf, before))

    def replace_vocabulary(self, size: int) -> None:
        """Tells the model its vocabulary's size until `detach`."""
        config: Any = self.model.config
        before = config.vocab_size
        config.vocab_size = size
        self._undo.append(lambda: setattr(config, "vocab_size", before))


class DeltaLinear(nn.Module):
    """A base projection plus its delta."""

    def __init__(self, base: nn.Linear, delta: FactoredDelta | DenseDelta) -> None:
        super().__init__()
        self.base, self.delta = base, delta
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = delta_linear(x, self.delta) if isinstance(self.delta, FactoredDelta) else dense_linear(x, self.delta)
        result: torch.Tensor = self.base(x) + added
        return result


class _TokenRows(nn.Module):
    """A base matrix with a row per token, of which some rows are replaced, or all have a quantized delta.

    The tuned matrix may have more rows than the base's (zero where nothing is said) or fewer.
    """

    def __init__(self, weight: torch.Tensor, record: RowsRecord | DenseRecord) -> None:
        super().__init__()
        self.weight, self.rows = weight, record.shape[0]
        self.known = min(len(weight), self.rows)
        self.dense = DenseDelta.of(record, weight.device) if isinstance(record, DenseRecord) else None
        self.indices = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self.values = weight[:0]
        if isinstance(record, RowsRecord):
            self.indices = torch.from_numpy(np.array(record.indices)).to(weight.device, torch.int64)
            self.values = _exact(record.values).to(weight)
        self.place = torch.full((self.rows,), -1, device=weight.device)
        self.place[self.indices] = torch.arange(len(self.indices), device=weight.device)


class DeltaEmbedding(_TokenRows):
    """Input embeddings: looks up the base's row, then what the delta says of it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.weight[tokens.clamp_max(self.known - 1)] * (tokens < self.known)[..., None]
        if self.dense is not None:
            return (found.float() + delta_rows(tokens, self.dense)).to(found.dtype)
        place = self.place[tokens]
        if not len(self.values):
            return found
        return torch.where((place >= 0)[..., None], self.values[place.clamp_min(0)], found)


class DeltaHead(_TokenRows):
    """lm_head: the base's logits, then what the delta says of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = x.new_zeros(*x.shape[:-1], self.rows)
        logits[..., : self.known] = linear(x, self.weight[: self.known])
        if self.dense is not None:
            return (logits.float() + dense_linear(x.float(), self.dense)).to(x.dtype)
        logits[..., self.indices] = linear(x, self.values)
        return logits


def attach(model: nn.Module, delta: Delta) -> Attachment:
    """Makes a base model compute its fine-tune.

    Projections, biases, norms, embeddings and lm_head all follow the delta; the base's weights are left as they are.
    Check the base first (`require_base`): this function sees names and shapes only.

    Args:
        model: a Hugging Face causal language model holding the base's weights.
        delta: opened; may be closed afterwards.

    Returns:
        The attachment, whose `detach` restores the base.

    Raises:
        AttachError: a record whose parameter the model lacks, or has in another shape.
    """
    attachment = Attachment(model)
    try:
        # Parameters before modules: a projection's bias must be in place when the projection is wrapped.
        records = sorted(delta.records(), key=lambda item: not isinstance(item[1], ReplaceRecord))
        for name, record in records:
            _attach_record(attachment, name, record)
        _attach_tied(attachment, delta)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def _attach_record(attachment: Attachment, name: str, record: Record) -> None:
    module_name, _, leaf = name.rpartition(".")
    try:
        module = attachment.model.get_submodule(module_name)
    except AttributeError as error:
        raise AttachError(f"{name}: the model has no module {module_name}") from error
    if isinstance(record, BaseRecord):
        return
    if isinstance(record, ReplaceRecord):
        weight = getattr(module, leaf, None)
        if weight is not None and weight.shape != record.shape:
            raise AttachError(f"{name}: the model has shape {list(weight.shape)}, the delta {list(record.shape)}")
        attachment.replace_parameter(name, _exact(record.values).to(next(module.parameters())))
    elif isinstance(module, nn.Embedding):
        _require_columns(name, module.weight, record)
        attachment.replace_module(module_name, DeltaEmbedding(module.weight, _token_record(name, record)))
        attachment.replace_vocabulary(record.shape[0])
    elif isinstance(module, nn.Linear):
        _attach_linear(attachment, name, module, record)
    else:
        raise AttachError(f"{name}: a {type(record).__name__} fits no {type(module).__name__}")


def _attach_linear(attachment: Attachment, name: str, module: nn.Linear, record: Record) -> None:
    module_name = name.removesuffix(".weight")
    _require_columns(name, module.weight, record)
    same_rows = record.shape[0] == module.out_features
    if isinstance(record, RowsRecord) or not same_rows:
        attachment.replace_module(module_name, DeltaHead(module.weight, _token_record(name, record)))
        return
    device = module.weight.device
    if isinstance(record, FactoredRecord):
        attachment.replace_module(module_name, DeltaLinear(module, FactoredDelta.of(record, device)))
    elif isinstance(record, DenseRecord):
        attachment.replace_module(module_name, DeltaLinear(module, DenseDelta.of(record, device)))


def _attach_tied(attachment: Attachment, delta: Delta) -> None:
    """An alias of a changed parameter follows it: a tied lm_head takes the embedding's record."""
    for alias, owner in delta.header.architecture.tied.items():
        if owner not in delta.names:
            continue
        head = attachment.model.get_submodule(alias.removesuffix(".weight"))
        record = delta.record(owner)
        if isinstance(record, (RowsRecord, DenseRecord)) and isinstance(head, nn.Linear):
            attachment.replace_module(alias.removesuffix(".weight"), DeltaHead(head.weight, record))


def _token_record(name: str, record: Record) -> RowsRecord | DenseRecord:
    if not isinstance(record, (RowsRecord, DenseRecord)):
        raise AttachError(f"{name}: a {type(record).__name__} cannot change the number of rows")
    return record


def _require_columns(name: str, weight: torch.Tensor, record: Record) -> None:
    grows = isinstance(record, (RowsRecord, DenseRecord))
    if weight.shape[1:] != record.shape[1:] or (len(weight) != record.shape[0] and not grows):
        raise AttachError(f"{name}: the model has shape {list(weight.shape)}, the delta {list(record.shape)}")


def _exact(values: ExactArray) -> torch.Tensor:
    return torch.from_numpy(np.array(values.to_float32()))
