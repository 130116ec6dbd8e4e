# SPDX-License-Identifier: Apache-2.0
"""What engine tests need and skip without: the plugin and a TensorRT."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from deltaweave.runtime_plugin.trt.backend import MODULES, find_plugin


@pytest.fixture(scope="session", autouse=True)
def tensorrt(native: Path) -> None:
    """Skips where the plugin was not built or TensorRT is not installed; CI has both, so there it fails."""
    missing = "the TensorRT plugin was not built" if find_plugin() is None else None
    if not any(find_spec(name) for name in MODULES):
        missing = "TensorRT is not installed"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
