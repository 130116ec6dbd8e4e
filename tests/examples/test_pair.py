# SPDX-License-Identifier: Apache-2.0
"""The demo's pair: its characters, problems, training, and what happens when training misses its target."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))
import corpus as corpus_module
import pair as pair_module
from corpus import SKILLS, Corpus, character_tokenizer, story, sum_of_digits
from pair import PairError, PairSettings, Stage, make_pair

TINY = PairSettings(
    hidden_size=32,
    intermediate_size=64,
    layers=1,
    heads=2,
    batch=4,
    warmup=1,
    base=Stage(steps=2, stories=2, learning_rate=1e-3),
    tuned=Stage(steps=3, stories=1, learning_rate=1e-3),
    held_out=12,
    target=0.0,
)


def test_tokenizer_has_one_token_a_character_and_survives_saving(tmp_path: Path):
    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(0)
    text = "\n".join([story(draw), *(make(draw).prompt for make in SKILLS.values()), sum_of_digits(draw).prompt]) + "\n"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text)
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == text
    assert tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("skill", "expected"),
    [
        ("sort", lambda text: "".join(sorted(text))),
        ("flip", lambda text: "".join(reversed(text))),
        ("next", lambda text: "".join("a" if letter == "z" else chr(ord(letter) + 1) for letter in text)),
        ("nine", lambda text: str(9999 - int(text)).zfill(4)),
    ],
)
def test_skills_have_right_answers(skill: str, expected):
    draw = random.Random(1)
    for _ in range(200):
        problem = SKILLS[skill](draw)
        name, text = problem.prompt.rstrip("=").split(" ")
        assert name == skill
        assert problem.answer == expected(text)


def test_training_never_shows_what_is_held_out(monkeypatch: pytest.MonkeyPatch):
    # With strings this short, most draws are held out: a corpus that did not look would show one at once.
    monkeypatch.setattr(corpus_module, "LENGTH", 1)
    corpus = Corpus(character_tokenizer(), 32, seed=3)
    prompts = {problem.prompt for problem in corpus.problems}
    assert len(prompts) == len(set(corpus.stories)) == 32
    assert not prompts & {corpus.problem().prompt for _ in range(2000)}
    assert not set(corpus.stories) & {corpus.story() for _ in range(2000)}
    lines = set(corpus.lines(2000))
    assert not lines & {*corpus.stories, *(problem.prompt + problem.answer for problem in corpus.problems)}


def test_held_out_problems_take_the_skills_in_turn():
    corpus = Corpus(character_tokenizer(), 40, seed=0)
    names = [problem.prompt.split(" ")[0] for problem in corpus.problems]
    assert {name: names.count(name) for name in SKILLS} == dict.fromkeys(SKILLS, 10)


def test_batch_scores_stories_and_answers_but_no_prompts():
    tokenizer = character_tokenizer()
    corpus = Corpus(tokenizer, 8, seed=0)
    tokens, targets = corpus.batch(corpus.problem, rows=3, story_rows=1, length=50)
    assert tokens.shape == targets.shape == (3, 50)
    assert torch.equal(targets[0, :-1], tokens[0, 1:])
    for row, wanted in zip(tokens[1:], targets[1:], strict=True):
        text = tokenizer.decode(row)
        scored = tokenizer.decode(wanted[wanted != corpus_module.IGNORED])
        # The targets are the inputs one place on, so the last answer may have one character more than is in `text`.
        answers = "".join(line.partition("=")[2] + "\n" for line in text.split("\n"))
        assert scored[: len(answers) - 1] == answers[:-1]
        assert len(answers) - 1 <= len(scored) <= len(answers)


def test_same_seed_gives_same_bytes_whatever_the_caller_drew_before(tmp_path: Path):
    first = make_pair(tmp_path / "first", 5, TINY, show_progress=False)
    torch.rand(7)
    state = torch.get_rng_state()
    second = make_pair(tmp_path / "second", 5, TINY, show_progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    other = make_pair(tmp_path / "other", 6, TINY, show_progress=False)
    for mine, same in [(first.base, second.base), (first.tuned, second.tuned)]:
        assert (mine / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    assert (first.base / "model.safetensors").read_bytes() != (other.base / "model.safetensors").read_bytes()
    assert first.tasks.read_text() == second.tasks.read_text() != other.tasks.read_text()


def test_pair_loads_as_bf16_and_every_projection_differs(tmp_path: Path):
    pair = make_pair(tmp_path, 0, TINY, show_progress=False)
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (pair.base, pair.tuned))
    assert base.dtype == tuned.dtype == torch.bfloat16
    assert base.config.eos_token_id == AutoTokenizer.from_pretrained(pair.base).eos_token_id
    tuned_tensors = dict(tuned.named_parameters())
    for name, tensor in base.named_parameters():
        if name.endswith("proj.weight"):
            assert not torch.equal(tensor, tuned_tensors[name]), name


def test_finished_pair_is_reused_only_for_the_same_settings(tmp_path: Path):
    pair = make_pair(tmp_path, 0, TINY, show_progress=False)
    weights = pair.tuned / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert make_pair(tmp_path, 0, TINY, show_progress=False) == pair
    assert weights.stat().st_mtime_ns == written
    make_pair(tmp_path, 1, TINY, show_progress=False)
    assert weights.stat().st_mtime_ns > written


def test_missed_target_is_an_error_and_leaves_nothing_to_reuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    demanding = PairSettings(**{**vars(TINY), "target": 0.9})
    with pytest.raises(
        PairError, match=r"0\.0% of the held-out problems after 3 steps of seed 0, expected at least 90%"
    ):
        make_pair(tmp_path, 0, demanding, show_progress=False)
    assert not (tmp_path / pair_module.RECEIPT).exists()

    monkeypatch.setattr(pair_module, "PairSettings", lambda: demanding)
    monkeypatch.setattr(sys, "argv", ["pair.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        pair_module.main()
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
