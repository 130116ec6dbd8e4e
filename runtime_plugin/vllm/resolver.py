# SPDX-License-Identifier: Apache-2.0
"""Tenants from a folder of files: a request for a model that is not loaded finds `NAME.safetensors` there.

vLLM's own switches are used: `VLLM_LORA_RESOLVER_CACHE_DIR` names the folder, `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` lets
models be loaded at run time.
"""

from __future__ import annotations

from pathlib import Path

import vllm.envs as envs
from deltaweave.runtime_plugin.vllm.folder import find_tenant
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

__all__ = ["FolderResolver", "register_folder"]

NAME = "deltaweave folder"


class FolderResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Finds a tenant's file by its name."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the files."""
        self.folder = folder

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request of a tenant; None if there is no such file."""
        path = find_tenant(self.folder, lora_name)
        return None if path is None else LoRARequest(lora_name, 1, str(path))  # vLLM puts the id in


def register_folder() -> None:
    """Tells vLLM of the folder, if there is one."""
    folder = envs.VLLM_LORA_RESOLVER_CACHE_DIR
    if folder and NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, FolderResolver(Path(folder)))
