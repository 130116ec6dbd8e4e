# SPDX-License-Identifier: Apache-2.0
"""`deltaweave validate` as a user types it, its files, and the pytest fixture."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from deltaweave.converter import CompressionOptions, Recipe, compress
from helpers import perturbed, tiny_checkpoint

from deltaweave.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "regression_suite"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    tuned = perturbed(base, folder / "tuned")
    compress(base, tuned, folder / "d.safetensors", CompressionOptions(Recipe(bands="4:8", group_size=32), "none"))
    (folder / "p.jsonl").write_text('{"prompt": "the <b>dog</b> & co"}\n{"prompt": "1+1=", "answer": "2"}\n')
    (folder / "kept.yaml").write_text("float32: {kl: 100, top1: 0, first_divergence: 0}\n")
    (folder / "broken.yaml").write_text("float32: {kl: 1.0e-9, top1: 0}\nfloat16: {logit_error: 0}\n")
    return folder


@pytest.fixture
def run(folder, capsys):
    """Runs the command on the pair; returns (exit status, output, errors)."""

    def run(*words):
        pair = ["--base", folder / "base", "--tuned", folder / "tuned", "--prompts", folder / "p.jsonl"]
        fixed = ["--dtype", "float32", "--max-new-tokens", 6, "--device", "cpu"]
        with pytest.raises(SystemExit) as exit_info:
            main(["validate", *map(str, [folder / "d.safetensors", *pair, *fixed, *words])])
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return run


def test_kept_thresholds(run, folder):
    status, out, _ = run("--thresholds", folder / "kept.yaml")
    assert status == 0
    assert "against float32" in out
    assert "against float16" not in out
    assert "<= 100" in out
    assert "BROKEN" not in out


def test_broken_thresholds_end_with_1_and_every_file_says_so(run, folder, tmp_path):
    junit, report = tmp_path / "ci" / "v.xml", tmp_path / "v.html"
    words = ["--thresholds", folder / "broken.yaml", "--junit", junit, "--report", report]
    status, out, _ = run(*words)
    assert status == 1
    assert out.count("BROKEN") == 2
    assert "expected <= 1e-09 (against float32)" in out
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    cases = {(case.get("classname").rpartition(".")[2], case.get("name")): case for case in suite.iter("testcase")}
    assert set(cases) == {("float16", "logit_error <= 0"), ("float32", "kl <= 1e-09"), ("float32", "top1 >= 0")}
    assert cases["float32", "top1 >= 0"].find("failure") is None
    assert "expected <= 1e-09" in cases["float32", "kl <= 1e-09"].find("failure").get("message")
    page = report.read_text("utf-8")
    assert "2 of 3 thresholds are broken" in page
    assert page.count("<svg") == 3
    assert "&lt;b&gt;dog&lt;/b&gt; &amp; co" in page
    assert "<b>dog" not in page
    assert page.count("broken:") == 2
    assert "http" not in page.replace("http://www.w3.org/", "")  # no outside resources
    status, out, _ = run("--thresholds", folder / "broken.yaml", "--json")
    content = json.loads(out)
    assert (status, content["passed"]) == (1, False)
    assert [check["metric"] for check in content["checks"] if not check["passed"]] == ["logit_error", "kl"]


def test_without_thresholds_everything_is_told_and_nothing_judged(run, tmp_path):
    report = tmp_path / "v.html"
    status, out, _ = run("--report", report, "--reference", "float32")
    assert status == 0
    assert "perplexity over the fine-tune's" in out
    assert "no thresholds were given" in report.read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--junit", "v.xml"], "--junit needs --thresholds"),
        (["--thresholds", "nowhere.yaml"], "nowhere.yaml: not readable as YAML"),
        (["--reference", "float16", "--thresholds", "{}/kept.yaml"], "limits against float32"),
        (["--reference", "float64"], "float64"),
        (["--engine", "e"], "give --base, or --engine"),
    ],
)
def test_errors_are_one_line(run, folder, words, message):
    status, out, errors = run(*(word.format(folder) for word in words))
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert message in lines[0]


def test_an_existing_report_is_refused_before_the_work(run, tmp_path):
    report = tmp_path / "v.html"
    report.write_text("mine")
    status, _, errors = run("--report", report)
    assert status == 2
    assert "exists (--force replaces it)" in errors
    assert "against" not in errors
    assert report.read_text() == "mine"


def suite(folder, *words):
    """Runs pytest as a user does, away from this suite's settings."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, *words, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_users_suite(folder, tmp_path):
    """Three lines of his own; a broken limit fails the test, by name and number."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["deltaweave.pytest_plugin"]\n')
    settings = {name: str(folder / name) for name in ("base", "tuned")} | {"prompts": str(folder / "p.jsonl")}
    settings |= {"max_new_tokens": 4, "dtype": "float32", "device": "cpu"}
    for name in ("kept", "broken"):
        (tmp_path / f"test_{name}.py").write_text(
            f"def test_it(validate):\n"
            f"    validate({str(folder / 'd.safetensors')!r}, thresholds={str(folder / name)!r} + '.yaml', "
            f"**{settings!r})\n"
        )
    done = suite(tmp_path, "--junitxml", str(tmp_path / "out.xml"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "expected <= 1e-09 (against float32)" in done.stdout
    names = [entry.get("name") for entry in ElementTree.parse(tmp_path / "out.xml").iter("property")]
    assert "d.safetensors (attach, float32) float32 kl" in names


@pytest.mark.slow
def test_the_example_suite(tmp_path):
    done = suite(EXAMPLE, "--basetemp", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
