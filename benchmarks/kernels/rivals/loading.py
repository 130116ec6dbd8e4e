# SPDX-License-Identifier: Apache-2.0
"""Where the rivals' packages lie: a folder with `vllm/`, `humming/` and `gemlite/`, never part of this repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["ENVIRONMENT", "RivalMissingError", "rival_folder", "use_package"]

ENVIRONMENT = "RIVALS"


class RivalMissingError(RuntimeError):
    """A rival's package was not found."""


def rival_folder(name: str) -> Path:
    """The folder from which `import name` works.

    Raises:
        RivalMissingError: RIVALS is not set, or has no such package.
    """
    root = os.environ.get(ENVIRONMENT)
    if not root:
        raise RivalMissingError(f"{name}: set {ENVIRONMENT} to the folder that holds it (benchmarks/kernels/README.md)")
    folder = Path(root).resolve() / name
    if not (folder / name).is_dir():
        raise RivalMissingError(f"{folder / name}: no such folder")
    return folder


def use_package(name: str) -> None:
    """Makes `import name` find the rival's package.

    Raises:
        RivalMissingError: as in `rival_folder`.
    """
    folder = str(rival_folder(name))
    if folder not in sys.path:
        sys.path.append(folder)
