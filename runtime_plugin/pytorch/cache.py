# SPDX-License-Identifier: Apache-2.0
"""A static key-value cache whose rows are at positions of their own, and the masks that go with it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PretrainedConfig

__all__ = ["RowCache", "attention_masks"]


class RowCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Keys and values [batch, length, heads, head_dim] a layer, in memory that never moves.

    A row's tokens lie at their positions from 0, whatever the other rows hold. What lies behind a row's last token is
    left over and hidden by the mask until it is written over.
    """

    def __init__(
        self, config: PretrainedConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes the memory, zeroed: what a mask hides must still be finite."""
        super().__init__(layers=[])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, batch, length, config.num_key_value_heads, head_dim)
        self.length = length
        self._store = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(batch, device=device)
        self._positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._seen = length
        self._whole = True

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return self._store.nbytes

    def aim(self, rows: torch.Tensor | int, positions: torch.Tensor, seen: int) -> None:
        """Says where the next step's tokens go.

        Args:
            rows: int64 [n], the cache's row of each row of the step; or n, for the first n without a copy.
            positions: int64 [n, tokens].
            seen: positions that the step looks at.
        """
        self._whole = isinstance(rows, int)
        self._rows = torch.arange(rows, device=positions.device) if isinstance(rows, int) else rows
        self._positions, self._seen = positions, seen

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a step's keys and values [n, heads, tokens, head_dim]; gives all that it looks at, likewise."""
        return self._write(layer, 0, keys), self._write(layer, 1, values)

    def get_seq_length(self, *_: Any) -> int:
        """Positions are always given, so none is counted here."""
        return 0

    def _write(self, layer: int, which: int, new: torch.Tensor) -> torch.Tensor:
        store = self._store[layer, which]
        store[self._rows[:, None], self._positions] = new.transpose(1, 2)
        found = store[: len(self._rows), : self._seen] if self._whole else store[self._rows, : self._seen]
        return found.transpose(1, 2)


def attention_masks(config: PretrainedConfig, positions: torch.Tensor, seen: int) -> Any:
    """What Hugging Face's decoders take as `attention_mask`: who sees which positions of its own row.

    Args:
        config: of the decoder.
        positions: int64 [n, tokens].
        seen: positions of the cache that the step looks at.

    Returns:
        bool [n, 1, tokens, seen]; for decoders with both kinds of layers, one such mask by kind.
    """
    keys = torch.arange(seen, device=positions.device)
    causal = (keys <= positions[..., None])[:, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is None or (kinds and "sliding_attention" not in kinds):
        return causal
    sliding = causal & (keys > positions[..., None] - window)[:, None]
    return {"full_attention": causal, "sliding_attention": sliding} if kinds else sliding
