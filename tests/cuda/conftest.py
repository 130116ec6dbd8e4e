# SPDX-License-Identifier: Apache-2.0
"""The library under test: the one of DELTAWEAVE_LIBRARY, or the host logic alone, built here by CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from deltaweave.runtime_plugin.library import Library

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Any build of the library; its host logic is the same with and without CUDA."""
    named = os.environ.get("DELTAWEAVE_LIBRARY")
    if named:
        return Library(Path(named))
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("libdeltaweave")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DDELTAWEAVE_HOST=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    return Library(build / "cuda" / "libdeltaweave.so")


@pytest.fixture(scope="session")
def gpu_library(library: Library) -> Library:
    """The library with kernels, on a machine that can run them."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not library.has_cuda:
        pytest.skip("needs DELTAWEAVE_LIBRARY, a libdeltaweave built with CUDA")
    return library
