# SPDX-License-Identifier: Apache-2.0
"""libdeltaweave and the TensorRT plugin for tests: those of DELTAWEAVE_LIBRARY, or ones without kernels, built here."""

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
    # In one folder, because the plugin is looked for beside the library.
    output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}"
    headers = f"-DTENSORRT_ROOT={os.environ.get('TENSORRT_ROOT', ROOT / 'build' / 'tensorrt-headers')}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build / "build"), "-DDELTAWEAVE_HOST=ON", output, headers]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build / "build"), "--parallel", "2"], check=True, capture_output=True)
    os.environ["DELTAWEAVE_LIBRARY"] = str(build / "libdeltaweave.so")
