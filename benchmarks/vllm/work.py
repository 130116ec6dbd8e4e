# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder that ask a served family have in common: their options, and its files."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

__all__ = ["FUSION", "Family", "family_parser"]

FUSION = "mix"


@dataclass(frozen=True)
class Family:
    """What `fine_tunes.py` or `tiny_fine_tunes.py` wrote.

    Attributes:
        folder: with a file for each tenant and `canaries.json`.
    """

    folder: Path

    @property
    def answers(self) -> dict[str, dict[str, str]]:
        """What each fine-tune says of each name."""
        found: dict[str, dict[str, str]] = json.loads((self.folder / "canaries.json").read_text())["answers"]
        return found

    @property
    def files(self) -> dict[str, Path]:
        """Of the deltas and of the fusion, by their names."""
        return {name: self.file(name) for name in (*self.answers, FUSION)}

    def file(self, name: str) -> Path:
        """Of one tenant."""
        return self.folder / f"{name}.safetensors"


def family_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser with `--base`, `--family` (a `Family`) and `--output`; `text` is the script's."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="as a Hugging Face folder")
    parser.add_argument(
        "--family",
        type=lambda folder: Family(Path(folder).resolve()),
        required=True,
        help="folder that fine_tunes.py or tiny_fine_tunes.py wrote",
    )
    parser.add_argument("--output", type=Path, help="JSON of the results")
    return parser
