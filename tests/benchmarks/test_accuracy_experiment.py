# SPDX-License-Identifier: Apache-2.0
"""The accuracy laboratory once over a tiny model, with a method that needs no calibration and two that do."""

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from deltaweave.converter import CompressionOptions, Recipe, compress
from helpers import perturbed, tiny_checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "experiment.py"


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"accuracy_{name}", SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_accuracy_lost_is_counted_item_by_item(monkeypatch):
    report = load("report", monkeypatch)
    tuned, cell = [False, True, True, True, False, True], [False, False, True, False, True, True]
    cells = ({"held_out_right": report.bits_of(right)} for right in (tuned, cell))
    share, error = report.lost(*cells, len(tuned))
    differences = [mine - theirs for mine, theirs in zip(tuned, cell, strict=True)]
    assert share == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.pstdev(differences) / len(tuned) ** 0.5)


def test_what_cells_share_changes_no_byte(tmp_path, monkeypatch):
    base = tiny_checkpoint(tmp_path / "base")
    tuned, text = perturbed(base, tmp_path / "tuned"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789. " * 8)
    measuring, measured = importlib.import_module("deltaweave.converter.measuring"), []
    layer_tables = measuring.Measurement._layer_tables

    def counted(*arguments):
        measured.append(arguments)
        return layer_tables(*arguments)

    monkeypatch.setattr(measuring.Measurement, "_layer_tables", counted)

    def made(name, ratio, **changes):
        options = CompressionOptions(Recipe.preset("optimal", ratio=ratio, **changes), str(text), 4, 32)
        return compress(base, tuned, tmp_path / name, options).read_bytes()

    wanted = [(1 / 2, {}), (1 / 4, {}), (1 / 4, {"sensitivity": "fisher"})]
    alone = [made(f"alone-{index}", ratio, **changes) for index, (ratio, changes) in enumerate(wanted)]
    measured.clear()
    with load("compression_cache", monkeypatch).CompressionCache(tmp_path).in_use():
        shared = [made(f"shared-{index}", ratio, **changes) for index, (ratio, changes) in enumerate(wanted)]
    assert shared == alone
    assert len(measured) == 2 * 2  # two layers, for either sensitivity


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
