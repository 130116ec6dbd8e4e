# SPDX-License-Identifier: Apache-2.0
"""`deltaweave compare` and `deltaweave generate` as a user types them: output, exit status, nothing half-written."""

import json

import pytest
import torch
from deltaweave.converter import CompressionOptions, Recipe, compress
from helpers import perturbed, tiny_checkpoint

from deltaweave.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    tuned = perturbed(base, folder / "tuned")
    compress(base, tuned, folder / "d.safetensors", CompressionOptions(Recipe(bands="4:8", group_size=32), "none"))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 8)
    (folder / "tasks.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return folder


@pytest.fixture
def run(folder, capsys):
    """Runs a command on the pair; returns (exit status, output, errors)."""

    def run(command, *words, base="base", tuned=True):
        pair = ["--base", str(folder / base)] + (["--tuned", str(folder / "tuned")] if tuned else [])
        with pytest.raises(SystemExit) as exit_info:
            main([command, str(folder / "d.safetensors"), *pair, *map(str, words)])
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return run


def measures(folder):
    return ["--text", folder / "text.txt", "--tasks", folder / "tasks.jsonl", "--sequence-length", 32]


def error_line(errors):
    """The one line that tells of the error; progress bars stand before it."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert errors.rstrip().endswith(lines[0])
    return lines[0]


def test_compare_prints_a_table_and_writes_the_report(run, folder, tmp_path):
    report, plots = tmp_path / "report.html", tmp_path / "plots"
    status, out, _ = run("compare", *measures(folder), "--report", report, "--plots", plots)
    assert status == 0
    for word in ("base", "fine-tune", "perplexity", "1+1="):
        assert word in out
    assert "How this report was made" in report.read_text("utf-8")
    assert (plots / "accuracy.png").is_file()


def test_compare_as_json(run, folder):
    status, out, _ = run("compare", *measures(folder), "--json")
    rows = json.loads(out)["candidates"]
    assert status == 0
    assert [row["name"] for row in rows] == ["base", "fine-tune", "d"]
    assert rows[2]["text"]["kl"] > rows[1]["text"]["kl"] == 0


def test_an_existing_report_is_refused_before_the_work(run, folder, tmp_path):
    report = tmp_path / "report.html"
    report.write_text("mine")
    status, out, errors = run("compare", *measures(folder), "--report", report)
    assert (status, out) == (2, "")
    assert error_line(errors) == f"error: {report}: exists (--force replaces it)"
    assert "comparing" not in errors
    assert report.read_text() == "mine"
    assert run("compare", "--report", report, "--force")[0] == 0
    assert report.read_text("utf-8") != "mine"


def test_compare_with_another_base(run, folder):
    status, _, errors = run("compare", base="tuned")
    assert status == 2
    assert "is not the base that" in error_line(errors)


def test_generate_streams_text(run):
    status, out, _ = run("generate", "--prompt", "the dog", "--max-new-tokens", 6, tuned=False)
    assert status == 0
    assert len(out.rstrip("\n")) >= 5


def test_generate_without_a_template(run):
    status, _, errors = run("generate", "--prompt", "the dog", "--chat", tuned=False)
    assert status == 2
    assert "no chat template" in error_line(errors)
