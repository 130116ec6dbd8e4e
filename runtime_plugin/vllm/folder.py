# SPDX-License-Identifier: Apache-2.0
"""A folder of tenants. No vLLM here."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_tenant"]

ENDINGS = (".safetensors", ".safetensors.index.json")


def find_tenant(folder: Path, name: str) -> Path | None:
    """The file of a tenant: `NAME.safetensors`, or the index of one in shards; None if there is none.

    Names come from requests: one that would lead out of the folder has no file.
    """
    if not name or name.startswith(".") or any(sign in name for sign in ("/", "\\", "\0")):
        return None
    return next((path for ending in ENDINGS if (path := folder / (name + ending)).is_file()), None)
