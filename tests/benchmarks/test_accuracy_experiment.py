# SPDX-License-Identifier: Apache-2.0
"""The accuracy laboratory once over a tiny model, with a method that needs no calibration and two that do."""

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "experiment.py"


def test_accuracy_lost_is_counted_item_by_item(monkeypatch):
    spec = importlib.util.spec_from_file_location("accuracy_report", SCRIPT.with_name("report.py"))
    report = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, report)  # where dataclasses look their module up
    spec.loader.exec_module(report)
    tuned, cell = [False, True, True, True, False, True], [False, False, True, False, True, True]
    cells = ({"held_out_right": report.bits_of(right)} for right in (tuned, cell))
    share, error = report.lost(*cells, len(tuned))
    differences = [mine - theirs for mine, theirs in zip(tuned, cell, strict=True)]
    assert share == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.pstdev(differences) / len(tuned) ** 0.5)


@pytest.mark.slow
def test_cells_are_made_once(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", hidden=128)
    words = ["--smoke", "--device", "cpu", "--items", "4", "--new-tokens", "4", "--samples", "4", "--seeds", "0"]
    words += ["--tunings", "german", "--methods", "triple", "optimal", "low-rank", "--ratios", "16"]
    words += ["--base", base, "--folder", tmp_path / "work", "--output", tmp_path / "out.json"]
    command = [sys.executable, SCRIPT, *words]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "failed" not in first.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    made = {f"german 0 {kind}" for kind in ("tuned", "base", "triple 1/16", "optimal 1/16", "low-rank 1/16")}
    assert set(result["cells"]) == made
    assert result["cells"]["german 0 tuned"]["kl"] == 0
    assert 0 < result["cells"]["german 0 optimal 1/16"]["ratio"] <= 0.5
    assert result["summary"]["triple 1/16"]["against_triple"] == 1
    assert all((tmp_path / f"out_{name}.png").stat().st_size > 5000 for name in ("kl", "held_out"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "{" not in again.stdout  # no cell was made anew
