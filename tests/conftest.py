# SPDX-License-Identifier: Apache-2.0
"""libdeltaweave for hosts under test: the one of DELTAWEAVE_LIBRARY, or its host logic alone, built here by CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever asks for the process's library finds one."""
    if os.environ.get("DELTAWEAVE_LIBRARY"):
        return
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("native")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DDELTAWEAVE_HOST=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    os.environ["DELTAWEAVE_LIBRARY"] = str(build / "cuda" / "libdeltaweave.so")
