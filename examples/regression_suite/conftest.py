# SPDX-License-Identifier: Apache-2.0
"""What the suite tests: here a tiny random pair and its delta, made first. Yours are files that you have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import deltaweave
from deltaweave import CompressionOptions, Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import write_random_family

pytest_plugins = ["deltaweave.pytest_plugin"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `tuned` and `tuned.safetensors`."""
    folder = tmp_path_factory.mktemp("models")
    base = write_random_family(folder, ["tuned"], change=0.1)
    options = CompressionOptions(Recipe.preset("triple", ratio=1 / 2), samples=8, sequence_length=64)
    deltaweave.compress(base, folder / "tuned", folder / "tuned.safetensors", options)
    return folder
