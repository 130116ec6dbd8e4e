# SPDX-License-Identifier: Apache-2.0
"""libdeltaweave and the TensorRT plugin for tests: those of DELTAWEAVE_LIBRARY, or ones without kernels, built here."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "tests"


@pytest.fixture(scope="session")
def native() -> Path:
    """The library's file; whatever asks for the process's library finds it."""
    if not os.environ.get("DELTAWEAVE_LIBRARY"):
        if not (shutil.which("cmake") and shutil.which("c++")):
            pytest.skip("needs cmake and a C++ compiler")
        os.environ["DELTAWEAVE_LIBRARY"] = str(_build())
    return Path(os.environ["DELTAWEAVE_LIBRARY"])


def _build() -> Path:
    """Builds what is not up to date; of pytest's processes the first builds, and the others wait for it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    # In one folder, because the plugin is looked for beside the library.
    output = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD}"
    headers = f"-DTENSORRT_ROOT={os.environ.get('TENSORRT_ROOT', ROOT / 'build' / 'tensorrt-headers')}"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-DDELTAWEAVE_HOST=ON", output, headers],
            ["cmake", "--build", str(BUILD), "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return BUILD / "libdeltaweave.so"
