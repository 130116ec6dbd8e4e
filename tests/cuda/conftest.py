# SPDX-License-Identifier: Apache-2.0
"""The library under test: the one of DELTAWEAVE_LIBRARY, or the host logic alone, built here by CMake."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltaweave.runtime_plugin.library import Library


@pytest.fixture(scope="session")
def library(native: Path) -> Library:
    """Any build of the library; its host logic is the same with and without CUDA."""
    return Library(native)


@pytest.fixture(scope="session")
def gpu_library(library: Library) -> Library:
    """The library with kernels, on a machine that can run them."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not library.has_cuda:
        pytest.skip("needs DELTAWEAVE_LIBRARY, a libdeltaweave built with CUDA")
    return library
