# SPDX-License-Identifier: Apache-2.0
"""The command of the comparison: its file is whole after every case, it stops in time, and one failure is one row."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"
sys.path.insert(0, str(KERNELS))
sys.path.insert(1, str(KERNELS.parent))
import compare  # noqa: E402
import results_file  # noqa: E402
from rivals import measure as measure_module  # noqa: E402
from rivals import timing  # noqa: E402
from rivals.contenders import Entry, plan  # noqa: E402
from rivals.measure import Row  # noqa: E402


class Run:
    """A run whose measurements take no device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.output = folder / "out" / "run.json"
        self.measured: list[str] = []
        self.seen: list[int] = []
        self.fails: set[str] = set()
        self.device_works = True
        monkeypatch.setattr(timing, "copy_rate", lambda: 4e12)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
        monkeypatch.setattr(compare.metadata, "version", lambda name: "1.0")
        monkeypatch.setattr(results_file.subprocess, "run", lambda *_, **__: argparse.Namespace(stdout="1.2\n"))
        monkeypatch.setattr(measure_module, "measure", self.measure)
        monkeypatch.setattr(measure_module, "device_works", lambda: self.device_works)

    def measure(self, kind: Any, case: Any, rate: float) -> Row:
        """Notes what the file held when it was called."""
        self.measured.append(kind.name)
        self.seen.append(len(json.loads(self.output.read_text())["rows"]) if self.output.exists() else 0)
        if kind.name in self.fails:
            return Row.of(kind, case, reason="illegal memory access")
        return Row.of(kind, case, us=1.0, share=0.5, error=1e-3, weight_bytes=1)

    def rows(self, entries: list[Entry], reasons: dict[str, str] | None = None, seconds: float = 100.0) -> list[Any]:
        """The rows of the file."""
        options = argparse.Namespace(output=self.output, seconds=seconds, date="2026-11-23")
        compare._run(entries, reasons or {}, options)
        return json.loads(self.output.read_text())["rows"]  # type: ignore[no-any-return]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run into an own folder."""
    return Run(monkeypatch, tmp_path)


ENTRIES = plan(["Llama-2-7B"], [8], [], ["models"])


def test_the_file_holds_every_finished_case(run: Run) -> None:
    rows = run.rows(ENTRIES)
    assert [row["contender"] for row in rows] == [kind.name for kind, _ in ENTRIES]
    assert sorted(set(run.seen)) == [0, 10, 20, 30]


def test_a_failure_is_one_row(run: Run) -> None:
    run.fails = {"bitdelta"}
    rows = run.rows(ENTRIES)
    assert {row["contender"] for row in rows if "reason" in row} == {"bitdelta"}
    assert len(run.measured) == len(ENTRIES)


def test_nothing_is_blamed_on_others_when_the_device_is_lost(run: Run) -> None:
    run.fails, run.device_works = {"bitdelta"}, False
    rows = run.rows(ENTRIES[:10])
    after = [row for row in rows if row["contender"].startswith("vllm")]
    assert {row["reason"] for row in after} == {"not run: bitdelta left the device unusable"}
    assert run.measured[-1] == "bitdelta"


def test_what_is_left_when_the_time_is_over_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    rows = run.rows(ENTRIES, seconds=45)
    assert 0 < len(run.measured) < len(ENTRIES)
    assert rows[-1]["reason"] == "not run: the run's 45 seconds were over"
    assert len(rows) == len(ENTRIES)


def test_what_a_worker_could_not_run_is_not_tried(run: Run) -> None:
    kind, case = next(entry for entry in ENTRIES if entry[0].name == "bitdelta")
    reasons = {f"bitdelta {kind.warm_key(kind.warm_case(case))}": "no kernel image"}
    rows = run.rows(ENTRIES, reasons)
    assert {row["reason"] for row in rows if row["contender"] == "bitdelta"} == {"no kernel image"}
    assert "bitdelta" not in run.measured
