# SPDX-License-Identifier: Apache-2.0
"""Damaged files, many of them, in a process of its own with little memory; see tests/fuzz_reader.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "fuzz_reader.py"
CASES = 40_000


@pytest.mark.parametrize("seed", [0])
def test_reader_survives_damage(seed):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(CASES), str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads(result.stdout)
    assert summary["failures"] == []
    assert summary["missed"] == 0
    assert summary["cases"] == CASES
    assert summary["outcomes"]["refused"] > CASES // 2
    assert summary["outcomes"]["read, with problems"] > 100
