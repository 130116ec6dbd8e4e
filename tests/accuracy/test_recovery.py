# SPDX-License-Identifier: Apache-2.0
"""Quality on a small trained pair may not fall below what is on record.

`record.json` holds the KL to the fine-tune of every recipe at 1/8 and 1/16, mean of two pairs, by how much another
machine's rounding may move it, and what it was measured on. Falling below fails. So does a record that asks for less
than an earlier one: it is held against every version of it in the history that it builds on, the one where a change
leaves the main branch among them, so that no order of commits gets around it. A change that betters the figures may
lower them:

    python tests/accuracy/test_recovery.py

The pairs are trained anew, in one thread, so all that moves a figure is how another machine rounds. Seen so far: 2 % on
a second machine of the same kind, 12 % with two threads; the noise on record is twice that.

Without git, or in a clone without history, there is nothing to hold the record against; the test then skips, or fails
where DELTAWEAVE_HISTORY=required is set.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))
from deltaweave.converter import Checkpoint, CompressionOptions, Recipe, compress, tuned_names, tuned_tensor
from deltaweave.formats import Delta
from pair import PairSettings, Stage, make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaweave.evaluation.text import load_text, score_text

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("record.json")
LENGTH = 64
SAMPLES = 256
SEEDS = (0, 1)
CASES = {
    f"{name} 1/{inverse}": (name, inverse, calibrated)
    for name, inverse, calibrated in (
        ("triple", 8, True), ("triple", 16, True), ("optimal", 8, True), ("optimal", 16, True), ("low-rank", 8, False),
    )
}  # fmt: skip
SETTINGS = PairSettings(
    hidden_size=256,
    intermediate_size=640,
    layers=2,
    heads=4,
    base=Stage(steps=60, stories=16, learning_rate=2e-3),
    tuned=Stage(steps=80, stories=3, learning_rate=2e-3),
    held_out=100,
    target=0.0,
)


@pytest.mark.slow
def test_no_recipe_falls_below_the_record(tmp_path):
    record = json.loads(RECORD.read_text())
    assert record["measured_on"] == conditions(), "what is measured is not what is on record"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the record was made
    try:
        measured = measure(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert fallen(record, measured) == []


def test_what_counts_as_falling():
    record = {"noise": 0.2, "kl": {"a": 1.0, "b": 2.0}}
    assert fallen(record, {"a": 1.19, "b": 0.1}) == []
    assert fallen(record, {"a": 1.21, "b": 2.0}) == ["a: 1.21, on record 1.0"]
    assert fallen(record, {"a": 1.0}) == ["b: None, on record 2.0"]
    assert fallen(record, {"a": float("nan"), "b": 2.0}) == ["a: nan, on record 1.0"]
    assert fallen(record, {"a": 1.0, "b": 2.0, "c": 1.0}) == ["c: 1.0, on record None"]


def test_the_record_was_never_lowered():
    earlier = earlier_records(ROOT)
    if not earlier:
        reason = "no earlier record: git or its history is missing (git fetch --unshallow)"
        (pytest.fail if os.environ.get("DELTAWEAVE_HISTORY") == "required" else pytest.skip)(reason)
    assert [line for before in earlier for line in lowered(before, json.loads(RECORD.read_text()))] == []


def test_what_counts_as_lowering():
    record = {"noise": 0.2, "kl": {"a": 1.0, "b": 2.0}, "measured_on": {"seeds": [0, 1]}}
    assert lowered(record, record) == []
    assert lowered(record, {**record, "kl": {"a": 0.9, "b": 2.0, "c": 5.0}}) == []
    assert lowered(record, {**record, "kl": {"a": 1.1, "b": 2.0}}) == ["a: 1.0 became 1.1"]
    assert lowered(record, {**record, "kl": {"a": 1.0}}) == ["b: 2.0 became None"]
    assert lowered(record, {**record, "kl": {"a": 1.0, "b": float("nan")}}) == ["b: 2.0 became nan"]
    assert lowered(record, {**record, "noise": 0.3}) == ["noise: 0.2 became 0.3"]
    assert lowered(record, {**record, "measured_on": {"seeds": [0]}}) == [
        "measured_on: {'seeds': [0, 1]} became {'seeds': [0]}"
    ]
    without = {key: record[key] for key in ("noise", "kl")}
    assert lowered(without, record) == []
    assert lowered(record, without) == ["measured_on: {'seeds': [0, 1]} became None"]


@pytest.fixture
def history(tmp_path):
    """A clone of this project's shape whose record was bettered on main, and then a branch."""
    root = tmp_path / "origin"
    record = root / RECORD.relative_to(ROOT)
    record.parent.mkdir(parents=True)
    assert git(root, "init", "--initial-branch", "main", ".") is not None
    for key, value in (("user.name", "T"), ("user.email", "t@example.invalid"), ("commit.gpgsign", "false")):
        git(root, "config", key, value)
    for kl in (2.0, 1.0):
        commit(root, record, kl)
    git(root, "checkout", "-b", "change")
    return root, record


def commit(root, record, kl):
    record.write_text(json.dumps({"noise": 0.1, "kl": {"a": kl}}))
    git(root, "add", "-A")
    assert git(root, "commit", "-m", "Record") is not None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_lowering_is_found_wherever_it_hides(history):
    root, record = history

    def found():
        now = json.loads(record.read_text())
        return [line for before in earlier_records(root) for line in lowered(before, now)]

    assert found() == []
    record.write_text(json.dumps({"noise": 0.1, "kl": {"a": 1.5}}))  # not yet committed
    assert found() == ["a: 1.0 became 1.5"]
    commit(root, record, 1.5)
    (root / "more").write_text("another commit behind it")
    commit(root, record, 1.5)
    assert "a: 1.0 became 1.5" in found()
    git(root, "checkout", "main")
    git(root, "merge", "--no-ff", "-m", "Merge", "change")  # landed as a merge
    assert "a: 1.0 became 1.5" in found()
    record.unlink()
    git(root, "add", "-A")
    git(root, "commit", "-m", "Forget the record")
    commit(root, record, 1.5)
    assert "a: 1.0 became 1.5" in found()
    commit(root, record, 0.9)
    assert found() == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_git_and_no_history(history, tmp_path):
    root, record = history
    shallow = tmp_path / "shallow"
    assert git(tmp_path, "clone", "--depth", "1", f"file://{root}", str(shallow)) is not None
    # It knows the tip alone, and fetches the rest where there is a place to fetch it from.
    assert [entry["kl"]["a"] for entry in earlier_records(shallow)] == [1.0, 2.0]
    offline = tmp_path / "offline"
    git(tmp_path, "clone", "--depth", "1", f"file://{root}", str(offline))
    git(offline, "remote", "set-url", "origin", "file:///gone")
    assert [entry["kl"]["a"] for entry in earlier_records(offline)] == [1.0]
    exported = tmp_path / "exported"
    (exported / record.relative_to(root)).parent.mkdir(parents=True)
    assert earlier_records(exported) == []


def fallen(record, measured):
    """Where a measured KL is worse than the record by more than its noise."""
    limits = {name: kl * (1 + record["noise"]) for name, kl in record["kl"].items()}
    return [
        f"{name}: {measured.get(name)}, on record {record['kl'].get(name)}"
        for name in {**limits, **measured}
        if not (name in limits and name in measured and measured[name] <= limits[name])
    ]


def lowered(before, now):
    """What in `now` asks for less than `before` did."""
    pairs = [("noise", before["noise"], now["noise"])]
    pairs += [(name, kl, now["kl"].get(name)) for name, kl in before["kl"].items()]
    lines = [f"{name}: {old} became {new}" for name, old, new in pairs if new is None or not new <= old]
    if "measured_on" in before and now.get("measured_on") != before["measured_on"]:
        lines.append(f"measured_on: {before['measured_on']} became {now.get('measured_on')}")
    return lines


def earlier_records(root):
    """Every version of the record in the history of `root`, the newest first; what a shallow clone lacks is fetched."""
    name = RECORD.relative_to(ROOT).as_posix()
    if git(root, "rev-parse", "--show-toplevel") != str(root.resolve()):
        return []
    if git(root, "rev-parse", "--is-shallow-repository") == "true":
        git(root, "fetch", "--quiet", "--unshallow")
    commits = (git(root, "log", "--full-history", "--format=%H", "HEAD", "--", name) or "").split()
    versions = [git(root, "show", f"{commit}:{name}") for commit in commits]
    return [json.loads(version) for version in versions if version]


def conditions():
    """What the record is measured on; the recipes are its entries."""
    return {"seeds": list(SEEDS), "length": LENGTH, "samples": SAMPLES, "pair": asdict(SETTINGS)}


def git(folder, *words):
    """What git prints, None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=folder,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def measure(folder):
    """Geometric mean over the pairs of each case's KL on held-out stories and solved problems."""
    logs = {name: [] for name in CASES}
    for seed in SEEDS:
        pair = make_pair(folder / f"pair-{seed}", seed, SETTINGS, show_progress=False)
        tuned = AutoModelForCausalLM.from_pretrained(pair.tuned, dtype=torch.float32).eval()
        candidate = AutoModelForCausalLM.from_pretrained(pair.tuned, dtype=torch.float32).eval()
        tokens = held_out_tokens(pair, folder)
        for name, (recipe, inverse, calibrated) in CASES.items():
            options = CompressionOptions(
                Recipe.preset(recipe, ratio=1 / inverse),
                str(pair.calibration) if calibrated else "none",
                samples=SAMPLES,
                sequence_length=LENGTH,
                device="cpu",
            )
            path = compress(pair.base, pair.tuned, folder / "delta.safetensors", options, force=True, restart=True)
            base = Checkpoint.open(pair.base)
            with Delta.open(path) as delta:
                count = delta.byte_count()
                assert count.projections * inverse <= count.tuned_projections  # no quality by more bytes
                state = {tensor: tuned_tensor(base, delta, tensor) for tensor in tuned_names(base, delta)}
            candidate.load_state_dict(state, strict=False)
            logs[name].append(torch.tensor(score_text(tuned, candidate, tokens).kl).log())
    return {name: float(torch.stack(values).mean().exp()) for name, values in logs.items()}


def held_out_tokens(pair, folder):
    """Held-out stories, and held-out problems with their answers, [sequences, LENGTH]."""
    problems = [json.loads(line) for line in pair.tasks.read_text().splitlines()]
    text = folder / "held-out.txt"
    text.write_text(pair.text.read_text() + "\n".join(task["prompt"] + task["answer"] for task in problems))
    return load_text(text, AutoTokenizer.from_pretrained(pair.tuned), LENGTH, 10_000)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = {case: float(f"{kl:.4g}") for case, kl in measure(Path(name)).items()}
    print(json.dumps(found, indent=1))
    noise = json.loads(RECORD.read_text())["noise"] if RECORD.is_file() else 0.25
    RECORD.write_text(json.dumps({"noise": noise, "kl": found, "measured_on": conditions()}, indent=1) + "\n")
