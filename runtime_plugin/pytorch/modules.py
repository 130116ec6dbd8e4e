# SPDX-License-Identifier: Apache-2.0
"""What stands in a model where the base's linear layers and embeddings stood, computing the fine-tune's."""

from __future__ import annotations

from typing import Protocol

import torch
from deltaweave.formats import BaseRecord, DenseRecord, FactoredRecord, RowsRecord
from deltaweave.runtime_plugin.pytorch.packed import DenseDelta, FactoredDelta, exact_tensor
from deltaweave.runtime_plugin.pytorch.reference import delta_linear, delta_rows, dense_linear
from torch import nn
from torch.nn import functional

__all__ = ["MatrixRecord", "TunedEmbedding", "TunedLinear", "shared_linear"]

MatrixRecord = FactoredRecord | DenseRecord | RowsRecord | BaseRecord


class TunedLinear(nn.Module):
    """A base linear layer, and what a record makes of it.

    The tuned layer may have more outputs than the base's (their base part is zero) or fewer.
    """

    def __init__(self, base: nn.Linear, record: MatrixRecord) -> None:
        """Wraps `base`, whose parameters stay as they are; `record` is of its weight."""
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, int(record.shape[0])
        self._change = _change(record, base.weight.device)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that asks for its device or dtype."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of x."""
        y = self.base(x)
        if self.base.out_features != self.out_features:
            y = functional.pad(y, (0, self.out_features - self.base.out_features))
        return self._change.outputs(y, x)


class TunedEmbedding(nn.Module):
    """A base embedding, and what a record makes of it; missing base rows count as zero."""

    def __init__(self, base: nn.Embedding, record: MatrixRecord) -> None:
        """Wraps `base`, whose weight stays as it is; `record` is of that weight."""
        super().__init__()
        self.base = base
        self.num_embeddings, self.embedding_dim = int(record.shape[0]), base.embedding_dim
        self._change = _change(record, base.weight.device)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that asks for its device or dtype."""
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] token ids to [..., embedding_dim] in the base's dtype."""
        known = ids < self.base.num_embeddings
        rows = self.base(torch.where(known, ids, 0)) * known[..., None]
        return self._change.rows(rows, ids)


def shared_linear(weight: nn.Parameter) -> nn.Linear:
    """A linear layer over a weight that belongs to another module: a tied lm_head."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


class _Change(Protocol):
    """What a record does to a matrix [rows, columns]."""

    def outputs(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The tuned matrix times x, from y, the base's (resized) times x."""
        ...

    def rows(self, found: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the tuned matrix, from the base's."""
        ...


def _change(record: MatrixRecord, device: torch.device) -> _Change:
    if isinstance(record, FactoredRecord):
        return _Factored(FactoredDelta.of(record, device))
    if isinstance(record, DenseRecord):
        return _Dense(DenseDelta.of(record, device))
    if isinstance(record, RowsRecord):
        return _Rows(record, device)
    return _Nothing()


class _Nothing:
    def outputs(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y

    def rows(self, found: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return found


class _Factored:
    def __init__(self, delta: FactoredDelta) -> None:
        self.delta = delta

    def outputs(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y + delta_linear(x, self.delta)

    def rows(self, found: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (found.float() + delta_rows(ids, self.delta)).to(found.dtype)


class _Dense:
    def __init__(self, delta: DenseDelta) -> None:
        self.delta = delta

    def outputs(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y + dense_linear(x, self.delta)

    def rows(self, found: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (found.float() + delta_rows(ids, self.delta)).to(found.dtype)


class _Rows:
    """Replaced rows; `place` tells for every row where its new values are, or -1."""

    def __init__(self, record: RowsRecord, device: torch.device) -> None:
        self.values = exact_tensor(record.values, device)
        self.indices = torch.tensor(record.indices, dtype=torch.int64, device=device)
        self.place = torch.full((record.shape[0],), -1, device=device)
        self.place[self.indices] = torch.arange(len(self.indices), device=device)

    def outputs(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.index_copy(-1, self.indices, functional.linear(x, self.values.to(x.dtype)).to(y.dtype))

    def rows(self, found: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if not len(self.values):
            return found
        place = self.place[ids]
        values = self.values[place.clamp_min(0)].to(found.dtype)
        return torch.where((place >= 0)[..., None], values, found)
