# SPDX-License-Identifier: Apache-2.0
"""Unfinished training in one file beside the output: written whole or not at all, and refused by another training."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaweave.converter import OutputError, ResumeError

__all__ = ["load_state", "save_state"]


def save_state(path: Path, key: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes tensors, numbers and lists durably.

    Raises:
        OutputError: what the system said.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"key": _canonical(key), "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def load_state(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save_state` wrote, None if there is nothing.

    Raises:
        ResumeError: a file of another training, or one that is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        recorded, state = json.loads(found["key"]), found["state"]
    except Exception as error:  # torch raises many things at files that it did not write
        raise ResumeError(
            f"{path}: unfinished work is damaged ({str(error).partition(chr(10))[0]}); delete it"
        ) from error
    wanted = json.loads(_canonical(key))
    if recorded != wanted:
        changed = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
        raise ResumeError(
            f"{path}: holds unfinished work with other options ({', '.join(changed)}); "
            "repeat the first command to finish it, or pass --restart to discard it"
        )
    return dict(state)


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
