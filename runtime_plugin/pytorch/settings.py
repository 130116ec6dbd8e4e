# SPDX-License-Identifier: Apache-2.0
"""What an arena's tenants change beside the bytes in its buffer, by slot, in tensors that steps index."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from deltaweave.runtime_plugin.pytorch.tenant import ParameterTable, Tenant
from deltaweave.runtime_plugin.tables import EMBEDDING

__all__ = ["SlotSettings", "pinned"]


class SlotSettings:
    """Rows of slots, the base's for every slot at first. Row -1, the last, stays the base's.

    Attributes:
        vocabulary: int64 [slots + 1], tokens that it knows.
        inverse_frequencies: float32 [slots + 1, head_dim / 2], of its rotary embedding.
        rotary_scale: float32 [slots + 1].
    """

    def __init__(self, table: ParameterTable, slots: int, device: torch.device) -> None:
        """Takes the memory."""
        self.vocabulary = torch.full((slots + 1,), table[EMBEDDING].shape[0], device=device)
        self.inverse_frequencies = table.rotary.inv_freq.float().to(device).repeat(slots + 1, 1)
        self.rotary_scale = torch.full((slots + 1,), float(table.rotary.attention_scaling), device=device)
        self._places: dict[int, slice] = {}  # of kept vectors in a row, by their place in the table
        self._base, self._vectors = torch.empty(0), torch.empty(slots + 1, 0, device=device)

    def keep(self, vectors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Keeps some vector parameters here too, for a host that reads them without the library's kernels.

        Args:
            vectors: the base's, [features] each, by their place in the table; all of one dtype.

        Returns:
            each one's [slots + 1, features].
        """
        bounds = itertools.accumulate((len(vector) for vector in vectors.values()), initial=0)
        self._places = {index: slice(*pair) for index, pair in zip(vectors, itertools.pairwise(bounds), strict=True)}
        row = torch.cat(list(vectors.values()))
        self._base, self._vectors = row.cpu(), row.repeat(len(self.vocabulary), 1)
        return {index: self._vectors[:, place] for index, place in self._places.items()}

    def write(self, slot: int, tenant: Tenant) -> None:
        """Makes a slot the tenant's, in the current stream's order."""
        self.vocabulary[slot] = tenant.vocabulary
        self.inverse_frequencies[slot].copy_(pinned(tenant.inverse_frequencies, self.vocabulary), non_blocking=True)
        self.rotary_scale[slot] = tenant.rotary_scale
        if not self._places:
            return
        row = self._base.clone()
        for record in tenant.records:
            if record.parameter in self._places:
                values: Any = record.content  # a vector's are float32 [features]
                row[self._places[record.parameter]] = torch.from_numpy(values).to(row.dtype)
        self._vectors[slot].copy_(pinned(row, self._vectors), non_blocking=True)


def pinned(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Host values that can be copied to the target's device without waiting."""
    return values.pin_memory() if target.is_cuda else values
