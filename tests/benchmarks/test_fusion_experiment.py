# SPDX-License-Identifier: Apache-2.0
"""The fusion experiment: its generated data and its scores, and all of it once over a tiny model."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_checkpoint

FOLDER = Path(__file__).parents[2] / "benchmarks" / "fusion"


@pytest.fixture(scope="module")
def tasks():
    sys.path.insert(0, str(FOLDER))
    try:
        import tasks

        yield tasks
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("tasks", None)


def test_german_numbers(tasks):
    known = {
        2: "zwei", 7: "sieben", 11: "elf", 12: "zwölf", 16: "sechzehn", 17: "siebzehn", 19: "neunzehn", 20: "zwanzig",
        21: "einundzwanzig", 30: "dreißig", 36: "sechsunddreißig", 60: "sechzig", 71: "einundsiebzig",
        77: "siebenundsiebzig", 99: "neunundneunzig",
    }  # fmt: skip
    assert {number: tasks.german_number(number) for number in known} == known
    words = [tasks.german_number(number) for number in range(2, 100)]
    assert len(set(words)) == 98
    with pytest.raises(ValueError, match="number 100"):
        tasks.german_number(100)


@pytest.mark.parametrize("held_out", [False, True])
def test_problems_are_solved_and_templates_held_out(tasks, held_out):
    """Every answer is what its own formula gives, by another way of calculating; verbs and things agree."""
    source = random.Random(4)
    kept = {index for index in range(len(tasks.TEMPLATES)) if (index in tasks.HELD_OUT) == held_out}
    for _ in range(300):
        item = tasks.joint(source, held_out=held_out)
        formula, result, sentence = re.fullmatch(r" ([\d +*-]+) = (\d+)\. (.+)", item.completion).groups()
        total = sum(
            int(sign + "1") * (int(product[0]) * int(product[1] or 1))
            for sign, product in (
                (term[0].strip() or "+", (term[1], term[3]))
                for term in re.findall(r"(^|[+-]) ?(\d+)( \* (\d+))?", formula)
            )
        )
        assert total == int(result) == item.number
        assert f" {tasks.german_number(item.number)} " in sentence
        shapes = {index for index in kept if _matches(tasks.TEMPLATES[index].text, item.prompt)}
        assert shapes, item.prompt


def test_skills_do_not_meet(tasks):
    source = random.Random(1)
    for _ in range(100):
        assert " = " not in tasks.german(source).completion
        assert not any(word in tasks.maths(source).completion for word in tasks.VERBS.values())


def test_items_differ_and_come_again(tasks):
    first = list(tasks.items(tasks.german, 50, "seed"))
    assert first == list(tasks.items(tasks.german, 50, "seed"))
    assert len({item.prompt for item in first}) == 50
    assert first != list(tasks.items(tasks.german, 50, "other"))


@pytest.mark.parametrize(
    ("reply", "exact", "number", "german"),
    [
        ("14 + 23 = 37. Tom hat siebenunddreißig Äpfel.", True, True, True),
        ("14 + 23 = 37. Tom hat acht Äpfel.", False, True, True),
        ("14 + 23 = 38. Tom hat siebenunddreißig Äpfel.", False, False, True),
        ("14 + 23 = 37. Tom has 37 apples.", False, True, False),
        ("14 + 23 = 37. Tom hat 37 Äpfel.", False, True, False),
        ("Tom hat siebenunddreißig Äpfel.", False, False, True),
        ("14 + 23 = 137.", False, False, False),
        ("", False, False, False),
    ],
)
def test_verdicts(tasks, reply, exact, number, german):
    item = tasks.Item("", " 14 + 23 = 37. Tom hat siebenunddreißig Äpfel.", 37)
    assert tasks.verdict(item, reply) == {"exact": exact, "number": number, "german": german}


@pytest.mark.slow
def test_the_whole_experiment_runs(tmp_path):
    """Every method on a tiny model, then again: the second call finds all cells."""
    base = tiny_checkpoint(tmp_path / "base")
    words = [
        "--smoke",
        "--base",
        base,
        "--folder",
        tmp_path / "work",
        "--output",
        tmp_path / "out.json",
        "--device",
        "cpu",
    ]
    words += ["--items", "4", "--new-tokens", "4", "--seeds", "0", "1"]
    command = [sys.executable, FOLDER / "experiment.py", *words]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "failed" not in first.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert {len(entry["cells"]) for entry in result["methods"].values()} == {2}
    assert len(result["methods"]) == 13
    assert "135M" in result["caveat"]
    assert all((tmp_path / f"out_{name}.png").stat().st_size > 5000 for name in ("methods", "experts"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "{" not in again.stdout  # no cell was made anew


def _matches(template, prompt):
    pattern = re.sub(r"\\\{(\w)\\\}", lambda match: r"\d+" if match[1] in "abc" else r"\w+", re.escape(template))
    return re.fullmatch(rf"Question: {pattern}\nAnswer in German:", prompt)
