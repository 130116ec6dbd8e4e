# SPDX-License-Identifier: Apache-2.0
"""`--quantization deltaweave`: the base stays in 16 bits, and tenants are served over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

__all__ = ["NAME", "DeltaweaveConfig"]

NAME = "deltaweave"


class DeltaweaveConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not there when types are checked
    """The switch of this host. Layers are built and loaded as without it; the manager changes them afterwards."""

    def get_name(self) -> str:
        """What users write."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """What the library is built for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """The base has no file for it."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DeltaweaveConfig:
        """There is nothing to be read."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The methods of layers without quantization."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
