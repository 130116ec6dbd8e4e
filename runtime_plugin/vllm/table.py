# SPDX-License-Identifier: Apache-2.0
"""The base behind vLLM's workers: its checkpoint on disk, and the table of what one rank holds of it. No vLLM here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deltaweave.formats import BaseIdentity
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.library import Parameter, ParameterKind
from deltaweave.runtime_plugin.pytorch.fit import require_base
from deltaweave.runtime_plugin.pytorch.tenant import ParameterTable
from deltaweave.runtime_plugin.records import ServedRecord
from deltaweave.runtime_plugin.shards import Cut, RankLayout, shard_records
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

__all__ = ["BaseFiles", "RankTable"]


@dataclass(frozen=True)
class BaseFiles:
    """A checkpoint's folder; vLLM's own tensors are fused and cut, and say nothing of the whole.

    Attributes:
        folder: with safetensors, if it has weights at all.
        settings: of the model, where config.json lies elsewhere; None to read it from the folder.
    """

    folder: Path
    settings: PretrainedConfig | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the base."""
        return AutoConfig.from_pretrained(self.folder) if self.settings is None else self.settings

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in names.items()}
        found = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        return found

    def find(self, name: str) -> torch.Tensor | None:
        """A tensor as it is stored."""
        if name not in self.files:
            return None
        with safe_open(self.files[name], "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


class RankTable(ParameterTable):
    """What tenants may change of a base, and which part of it this rank holds.

    Files are checked against the whole parameters; the arena's records are of the rank's parts.
    """

    def __init__(self, files: BaseFiles, rank: int = 0, ranks: int = 1) -> None:
        """Lists the parameters of the base's configuration; nothing of its weights is read.

        Args:
            files: of the base.
            rank: of this process in its tensor-parallel group.
            ranks: of the group.

        Raises:
            AttachError: a family that is not served, or one that cannot be cut so.
        """
        config: Any = files.config
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        super().__init__(skeleton, int(config.vocab_size), gates=True)
        self.rotary = type(self.rotary)(config=config)
        self.files = files
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layout = RankLayout(rank, ranks, config.num_attention_heads, config.num_key_value_heads, head_dim)

    def cut(self, name: str) -> Cut | None:
        """The rank's part of a parameter; None for all of it."""
        return self.layout.cut(name, self[name].shape)

    def rows(self, name: str) -> int:
        """Outputs of a parameter on this rank."""
        cut = self.cut(name)
        return self[name].shape[0] if cut is None or cut.axis == "in" else cut.extent

    def out_offset(self, name: str) -> int:
        """How far the rank's first output lies behind a multiple of 128."""
        cut = self.cut(name)
        return cut.offset if cut is not None and cut.axis == "out" else 0

    def in_offset(self, name: str) -> int:
        """How far the rank's first input lies behind a multiple of 128."""
        cut = self.cut(name)
        return cut.offset if cut is not None and cut.axis == "in" else 0

    def shapes(self) -> list[Parameter]:
        """The rank's parts as the library wants them."""
        return [self._shape(name) for name in self.names]

    def local(self, records: Iterable[ServedRecord]) -> Iterable[ServedRecord]:
        """The rank's parts of a tenant's records."""
        return shard_records(records, lambda parameter: self.cut(self._ordered[parameter]))

    def require_base(self, base: BaseIdentity) -> None:
        """Compares the checkpoint's values with a file's base, once for all files of the same base."""
        if base.root not in self._checked:
            require_base(self.files.find, base)
            self._checked.add(base.root)

    def read(self, name: str) -> NDArray[np.float32]:
        """A parameter's values, from the checkpoint.

        Raises:
            AttachError: it has none of that name.
        """
        tensor = self.files.find(name)
        if tensor is None:
            raise AttachError(f"{self.files.folder}: no tensor {name} in the base's files")
        values: NDArray[np.float32] = tensor.float().numpy()
        return values

    @cached_property
    def _ordered(self) -> list[str]:
        return self.names

    def _shape(self, name: str) -> Parameter:
        entry = self[name]
        cut = self.cut(name)
        if entry.kind == ParameterKind.VECTOR:
            return Parameter(kind=entry.kind, in_features=self.rows(name), out_features=1)
        columns = cut.extent if cut is not None and cut.axis == "in" else entry.shape[-1]
        rows = self.rows(name) if cut is not None and cut.axis == "out" else entry.rows
        return Parameter(
            kind=entry.kind,
            in_features=columns,
            out_features=rows,
            in_offset=self.in_offset(name),
            out_offset=self.out_offset(name),
        )
