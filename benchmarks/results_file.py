# SPDX-License-Identifier: Apache-2.0
"""What every result under `results/` says of its origin, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "circumstances", "write_result"]

ROOT = Path(__file__).resolve().parents[1]


def circumstances(device: str = "cuda") -> dict[str, Any]:
    """When, on what, with which versions and by which command a figure was made.

    Args:
        device: `cuda` or `cpu`, which did the work.
    """
    script, *options = sys.argv
    command = " ".join(["python", os.path.relpath(script, ROOT), *options])
    when = {"date": date.today().isoformat()}
    if device == "cuda":
        where = {"device": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    else:
        where = {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"}
    return when | where | {"torch": torch.__version__, "command": command}


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON; without a path it was only to be printed."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()
    )  # one line a GPU
