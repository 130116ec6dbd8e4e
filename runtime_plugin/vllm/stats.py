# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry point for statistics (`vllm.stat_logger_plugins`): tenants' counts on its Prometheus page."""

from __future__ import annotations

from typing import Any

from deltaweave.runtime_plugin.vllm.metrics import TenantCollector
from deltaweave.runtime_plugin.vllm.quantization import NAME
from vllm.v1.metrics.loggers import StatLoggerBase

__all__ = ["TenantStatLogger"]


class TenantStatLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Adds a collector to the registry; what vLLM itself records is of no interest."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """Once an engine; the first one's tenants are counted."""
        if vllm_config.model_config.quantization != NAME or engine_index:
            return
        from prometheus_client import REGISTRY

        model = vllm_config.model_config.served_model_name
        self._collector = TenantCollector(vllm_config.instance_id, model if isinstance(model, str) else model[0])
        REGISTRY.register(self._collector)

    def record(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing: the collector reads when it is asked."""

    def log_engine_initialized(self) -> None:
        """Nothing."""
