# SPDX-License-Identifier: Apache-2.0
"""Experiments made of cells: what is finished is a file, and the same command goes on from there."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_file import write_result

__all__ = ["Work"]


class Work:
    """The folder of finished cells, and the clock."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.until = folder, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    def cell(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A cell's result: an earlier one, a new one, or None if the time is up. What fails is told and left out."""
        path = self.folder / f"{name.replace(' ', '_')}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        if time.monotonic() > self.until:
            print(f"{name}: no time left", flush=True)
            return None
        started = time.monotonic()
        try:
            result = make()
        except Exception:  # one method's failure must not cost the others their cells
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
            return None
        result["seconds"] = round(time.monotonic() - started, 1)
        write_result(path, result)
        shown = {key: value for key, value in result.items() if isinstance(value, (int, float))}
        print(f"{name}: {json.dumps(shown)}", flush=True)
        return result
