# SPDX-License-Identifier: Apache-2.0
"""The report of the comparison with rivals: sums, ratios, goals, what is missing, plots. From rows with known times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"
sys.path.insert(0, str(KERNELS))
from rivals.cases import MODELS, Case, band_cases, model_cases, sweep_cases  # noqa: E402
from rivals.contenders import CONTENDERS  # noqa: E402
from rivals.measure import Row  # noqa: E402
from rivals.report import LABELS, draw, markdown  # noqa: E402
from rivals.tables import Results  # noqa: E402

RATE = 4e12
MODEL = "Llama-2-7B"
LAYERS = MODELS[MODEL][0]


def timed(name: str, case: Case, us: float, **more: Any) -> dict[str, Any]:
    """A measured row."""
    kind = CONTENDERS[name]
    read = kind.layer_bytes(case)
    values = {"us": us, "error": 1e-3, "weight_bytes": read, "share": read / us * 1e6 / RATE, **more}
    return Row.of(kind, case, **values).to_json()


def failure(name: str, case: Case, reason: str) -> dict[str, Any]:
    """A row without a measurement."""
    return Row.of(CONTENDERS[name], case, reason=reason).to_json()


def content(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's JSON."""
    return {
        "date": "2026-11-23",
        "device": "a device",
        "driver": "1.2",
        "cuda": "13.0",
        "versions": {"torch": "2.11"},
        "command": "python compare.py",
        "copy_rate_bytes_per_second": RATE,
        "rows": rows,
    }


def decode(name: str, us: float, tenants: int = 8) -> list[dict[str, Any]]:
    """The same time for all four groups of a decode step."""
    return [timed(name, case, us) for case in model_cases(MODEL, [tenants], [])]


def prefill(name: str, us: float, tokens: int = 512) -> list[dict[str, Any]]:
    """The same time for all four groups of a prefill."""
    return [timed(name, case, us) for case in model_cases(MODEL, [], [tokens])]


def goal(results: Results, part: str) -> Any:
    """The goal whose name holds `part`."""
    (found,) = [goal for goal in results.goals() if part in goal.name]
    return found


def test_a_models_time_is_the_sum_over_groups_and_layers() -> None:
    results = Results(content(decode("deltaweave", 25.0)))
    assert results.model_ms(MODEL, "deltaweave", (8, 8)) == pytest.approx(LAYERS * 4 * 25e-3)
    bytes_a_step = LAYERS * sum(CONTENDERS["deltaweave"].layer_bytes(case) for case in model_cases(MODEL, [8], []))
    assert results.model_share(MODEL, "deltaweave", (8, 8)) == pytest.approx(bytes_a_step / (LAYERS * 4 * 25e-6) / RATE)


def test_a_model_with_a_missing_group_has_no_time() -> None:
    results = Results(content(decode("deltaweave", 25.0)[:3]))
    assert results.model_ms(MODEL, "deltaweave", (8, 8)) is None
    assert results.model_share(MODEL, "deltaweave", (8, 8)) is None


def test_the_base_is_the_faster_of_cublas_and_the_copy_rate() -> None:
    parameters = LAYERS * sum(group.in_features * group.out_features for group in MODELS[MODEL][1])
    roofline = 2 * parameters / RATE * 1e3
    assert Results(content(decode("base", 1e4))).base_ms(MODEL, (8, 8)) == pytest.approx(roofline)
    assert Results(content(decode("base", 1.0))).base_ms(MODEL, (8, 8)) == pytest.approx(LAYERS * 4e-3)
    assert Results(content(prefill("base", 1e4))).base_ms(MODEL, (512, 1)) == pytest.approx(LAYERS * 40)


def test_goals_compare_with_the_right_rivals() -> None:
    rows = [*decode("deltaweave", 10.0), *decode("base", 20.0), *decode("vllm-lora", 90.0)]
    rows += [*decode("vllm-lora-tuned", 60.0), *prefill("base", 100.0), *prefill("deltaweave", 70.0)]
    rows += [*decode("deltaweave", 50.0, 128), *decode("base", 20.0, 128), *decode("merged-loop", 2000.0, 128)]
    rows += decode("merged-bmm", 900.0, 128)
    results = Results(content(rows))
    assert goal(results, "K2: delta over base, 8 tenants").got == "0.50"
    lora = goal(results, "over delta, 8 tenants")
    assert (lora.got, lora.reached) == ("6.00", True)
    merged = goal(results, "128 separate models")
    assert (merged.got, merged.reached) == (f"{900 / 70:.2f}", True)
    prefilled = goal(results, "prefill of 512")
    assert (prefilled.got, prefilled.reached) == ("1.70", False)
    assert goal(results, "prefill of 2048").reached is None


def test_the_bandwidth_goal_takes_the_worst_large_launch() -> None:
    small, large = [case for case in model_cases(MODEL, [8], []) if case.group.name in ("o", "gate_up")]
    assert CONTENDERS["deltaweave"].layer_bytes(small) < 64e6 < CONTENDERS["deltaweave"].layer_bytes(large)
    rows = [timed("deltaweave", small, 20.0, share=0.3), timed("deltaweave", large, 30.0, share=0.85)]
    found = goal(Results(content(rows)), "K1")
    assert (found.got, found.reached) == ("85%", True)


def test_humming_is_compared_band_by_band() -> None:
    one, two, *_ = band_cases([8])
    rows = [timed("deltaweave", one, 10.0), timed("humming", one, 30.0)]
    rows += [timed("deltaweave", two, 10.0), timed("humming", two, 9.0)]
    found = goal(Results(content(rows)), "humming")
    assert (found.got, found.reached) == ("0.90", False)
    assert goal(Results(content(rows[:2])), "humming").got == "3.00"


def test_the_tables_name_times_ratios_and_reasons() -> None:
    rows = [*decode("deltaweave", 10.0), *decode("vllm-lora", 60.0)]
    rows += [failure("humming", case, "no kernel image") for case in band_cases([8])]
    text = markdown(content(rows))
    assert f"| {LABELS['deltaweave']} | 1.28 |" in text
    assert f"| {LABELS['vllm-lora']} | 7.68 (6) |" in text
    missing = "- no kernel image: 5 measurements, 1 bit 4096x4096 8/8 to 8 bit 4096x4096 8/8"
    assert f"{missing} ({LABELS['humming']})" in text
    assert "1.0e-03" in text


def test_a_model_that_was_not_reached_has_no_table() -> None:
    rows = decode("deltaweave", 10.0)
    rows += [failure("deltaweave", case, "not run") for case in model_cases("Llama-2-13B", [8], [])]
    text = markdown(content(rows))
    assert "Llama-2-13B, all linears" not in text
    assert "- not run: 4 measurements, Llama-2-13B qkv 8/8 to Llama-2-13B down 8/8" in text


def test_every_contender_has_a_label() -> None:
    assert LABELS.keys() == CONTENDERS.keys()


def test_plots_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    rows = [*decode("deltaweave", 10.0), *decode("base", 20.0), *decode("deltaweave", 50.0, 32)]
    rows += [timed(name, case, 5.0) for case in sweep_cases() for name in ("deltaweave", "torch-loop")]
    paths = draw(content(rows), tmp_path, "run")
    assert sorted(path.name for path in paths) == ["run_share.png", "run_sweep.png", "run_tenants.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert draw(content([]), tmp_path, "empty") == []


def test_the_command_reports_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content(decode("deltaweave", 10.0))))
    command = [sys.executable, str(KERNELS / "compare.py"), "--report", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Llama-2-7B, all linears of a step" in done.stdout
    assert (tmp_path / "run_tenants.png").exists()


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(KERNELS / "compare.py"), "--workers", "0", "--output", str(tmp_path / "run.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("needs an NVIDIA GPU")
    assert not (tmp_path / "run.json").exists()
