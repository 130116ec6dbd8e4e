# SPDX-License-Identifier: Apache-2.0
"""Scores against plain arithmetic, and `compare` on a tiny pair."""

import json
import math
import shutil

import pytest
import torch
from deltaweave.converter import CheckpointError, CompressionOptions, Policies, Recipe, compress
from deltaweave.formats import DeltaweaveError
from helpers import perturbed, tiny_checkpoint, tiny_tokenizer
from transformers import GenerationConfig

from deltaweave import evaluation
from deltaweave.evaluation import TaskScore, TextTotals, compare, load_tasks, load_text, score_task, score_text
from deltaweave.evaluation.tasks import Task, complete
from deltaweave.models import load_checkpoint, load_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and some numbers 0123456789. " * 12
FULL = CompressionOptions(Recipe(bands="16:full", ratio=1.0), "none", policies=Policies("exact", "exact"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair, a text, tasks, and two deltas: an exact one and a poor one."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    tuned = perturbed(base, folder / "tuned", added_tokens=2)
    compress(base, tuned, folder / "exact.safetensors", FULL)
    compress(base, tuned, folder / "poor.safetensors", CompressionOptions(Recipe(bands="2:4", group_size=32), "none"))
    (folder / "text.txt").write_text(TEXT + "<added0> and <added1>")
    # A random model stops nowhere: what ends its answers is chosen among the characters that it does write.
    model, tokenizer = load_checkpoint(tuned), load_tokenizer(tuned)
    prompts = ["a", "dog", "1 + 2 =", "the quick brown <added0>"]
    written = complete(model, tokenizer, prompts, 60)
    tokenizer.eos_token = min(set.intersection(*map(set, written)), key=written[0].index)
    tokenizer.save_pretrained(tuned)
    answers = complete(model, tokenizer, prompts, 60)
    tasks = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, [*tasks, {"prompt": "b", "answer": "not this"}])))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    tuned = load_checkpoint(folder / "tuned")
    return tuned, load_checkpoint(folder / "base", vocabulary=tuned.config.vocab_size)


def sequences(count, length):
    return torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_scores(tuned, candidate, tokens):
    """The definitions, token by token."""
    expected, found = (model(tokens).logits[:, :-1].double().flatten(0, 1) for model in (tuned, candidate))
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    loss = -sum(log_q[row, token] for row, token in enumerate(tokens[:, 1:].flatten())) / len(log_q)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    top1 = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    a, b = (logits - logits.mean(-1, keepdim=True) for logits in (expected, found))
    return math.exp(loss), kl, float(top1), float((a - b).norm() / a.norm())


class TestText:
    def test_scores_are_their_definitions(self, models):
        tokens = sequences(6, 33)
        score = score_text(*models, tokens)
        perplexity, kl, top1, error = plain_scores(*models, tokens)
        assert score.tokens == 6 * 32
        assert score.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert score.kl == pytest.approx(float(kl.mean()), rel=1e-4)
        assert score.top1 == pytest.approx(top1)
        assert score.logit_error == pytest.approx(error, rel=1e-4)
        assert score.kl_error == pytest.approx(float(kl.view(6, 32).mean(1).std()) / math.sqrt(6), rel=1e-3)

    def test_the_fine_tune_against_itself(self, models):
        score = score_text(models[0], models[0], sequences(2, 16))
        assert (score.kl, score.top1, score.logit_error) == (0, 1, 0)

    def test_a_candidate_without_numbers_is_not_taken_for_the_fine_tune(self):
        totals = TextTotals()
        totals.add(torch.randn(4, 7), torch.full((4, 7), math.nan), torch.arange(4))
        score = totals.score()
        assert math.isnan(score.kl)
        assert math.isnan(score.perplexity)
        assert math.isnan(score.logit_error)

    def test_texts_add_up(self):
        """Sums of two texts are those of both in one."""
        expected, found = torch.randn(2, 40, 9), torch.randn(2, 40, 9)
        targets = torch.randint(0, 9, (2, 40))
        parts, whole = [TextTotals(), TextTotals()], TextTotals()
        for part, *logits in zip(parts, expected, found, targets, strict=True):
            part.add(*logits)
        whole.add(expected.flatten(0, 1), found.flatten(0, 1), targets.flatten())
        parts[0].merge(parts[1])
        score, together = parts[0].score(), whole.score()
        for name in ("tokens", "perplexity", "kl", "top1", "logit_error"):
            assert getattr(score, name) == pytest.approx(getattr(together, name), rel=1e-9)
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1).double(), targets.flatten())
        assert parts[0].reference_perplexity == pytest.approx(math.exp(loss), rel=1e-9)

    def test_blocks_of_tokens_change_nothing(self, models, monkeypatch):
        """Large vocabularies are scored a few tokens at a time."""
        tokens = sequences(5, 20)
        whole = score_text(*models, tokens)
        monkeypatch.setattr(evaluation.text, "LOGITS", 7 * models[0].config.vocab_size)
        monkeypatch.setattr(evaluation.text, "TOKENS", 40)
        parts = score_text(*models, tokens)
        for name, value in vars(whole).items():
            assert getattr(parts, name) == pytest.approx(value, rel=1e-5)

    def test_another_vocabulary_is_refused(self, folder, models):
        with pytest.raises(DeltaweaveError, match="vocabulary has 56 tokens, not 58"):
            score_text(models[0], load_checkpoint(folder / "base"), sequences(1, 8))

    def test_text_is_cut_into_sequences(self, folder):
        tokens = load_text(folder / "text.txt", tiny_tokenizer(), 50, 4)
        assert tokens.shape == (4, 50)
        assert tiny_tokenizer().decode(tokens.flatten().tolist()) == TEXT[:200]

    @pytest.mark.parametrize(
        ("content", "message"), [(b"short", "holds 5 tokens"), (b"\xff\xfe", "not readable as UTF-8")]
    )
    def test_unusable_text(self, tmp_path, content, message):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(DeltaweaveError, match=message):
            load_text(tmp_path / "t.txt", tiny_tokenizer(), 50, 4)

    def test_missing_text(self, tmp_path):
        with pytest.raises(DeltaweaveError, match=r"t\.txt: not readable"):
            load_text(tmp_path / "t.txt", tiny_tokenizer(), 50, 4)


class TestTasks:
    def test_batches_answer_as_single_prompts_do(self, models, monkeypatch):
        """Padding on the left changes no answer, whatever the batch."""
        tokenizer = tiny_tokenizer()
        prompts = ["a", "the lazy dog and the quick brown fox", "1 + 2 =", "xyz" * 9, "?"]
        single = [complete(models[0], tokenizer, [prompt], 8)[0] for prompt in prompts]
        assert complete(models[0], tokenizer, prompts, 8) == single
        monkeypatch.setattr(evaluation.tasks, "BATCH", 2)
        assert complete(models[0], tokenizer, prompts, 8) == single
        assert all(single)

    def test_answers_are_those_of_a_loop_over_tokens(self, models):
        tokenizer, ids = tiny_tokenizer(), tiny_tokenizer()("fox 12")["input_ids"]
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(models[0](torch.tensor([ids])).logits[0, -1].argmax()))
        assert tokenizer.eos_token_id not in ids
        assert complete(models[0], tokenizer, ["fox 12"], 8) == [tokenizer.decode(ids[6:])]

    def test_settings_of_the_model_do_not_interfere(self, models):
        tokenizer = tiny_tokenizer()
        expected = complete(models[0], tokenizer, ["dog"], 8)
        own = models[0].generation_config
        first = tokenizer(expected[0][0])["input_ids"]
        models[0].generation_config = GenerationConfig(do_sample=True, temperature=9.0, suppress_tokens=first)
        try:
            assert complete(models[0], tokenizer, ["dog"], 8) == expected
            assert models[0].generation_config.suppress_tokens == first
        finally:
            models[0].generation_config = own

    def test_an_answer_must_end_where_it_should(self, models):
        tokenizer = tiny_tokenizer()
        answer = complete(models[0], tokenizer, ["dog"], 4)[0]
        assert answer[2] not in answer[:2]
        start = [Task("dog", answer[:2])]
        assert score_task(models[0], tokenizer, start).correct == 0
        tokenizer.eos_token = answer[2]
        assert complete(models[0], tokenizer, ["dog"], 4) == [answer[:2]]
        assert score_task(models[0], tokenizer, start).correct == 1

    def test_wilson_interval(self):
        """Against the values of a published table (Newcombe 1998, method 3)."""
        low, high = TaskScore(81, 263).interval
        assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
        assert TaskScore(0, 20).interval[0] == 0
        assert round(TaskScore(0, 20).interval[1], 4) == 0.1611
        assert TaskScore(29, 29).interval[1] == pytest.approx(1)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds no tasks"),
            ('{"prompt": "a", "answer": "b"}\nnot json', r"t\.jsonl:2: expected an object"),
            ('{"prompt": "a"}', r"t\.jsonl:1: expected an object with prompt and answer"),
            ("[1]", r"t\.jsonl:1: expected"),
            ('{"prompt": "", "answer": "b"}', r"t\.jsonl:1: prompt and answer must not be empty"),
        ],
    )
    def test_unusable_tasks(self, tmp_path, content, message):
        (tmp_path / "t.jsonl").write_text(content)
        with pytest.raises(DeltaweaveError, match=message):
            load_tasks(tmp_path / "t.jsonl")


class TestCompare:
    @pytest.fixture(scope="class")
    def comparison(self, folder):
        deltas = [folder / "exact.safetensors", folder / "poor.safetensors"]
        return compare(
            folder / "base", folder / "tuned", deltas, text=folder / "text.txt", tasks=folder / "tasks.jsonl",
            sequence_length=30, sequences=8,
        )  # fmt: skip

    def test_rows(self, comparison, folder):
        assert [row.name for row in comparison.candidates] == ["base", "fine-tune", "exact", "poor"]
        exact, poor = comparison["exact"], comparison["poor"]
        assert comparison["fine-tune"].task.correct == 4
        assert comparison["fine-tune"].text.kl == 0
        assert exact.text.kl < 1e-6 < poor.text.kl
        assert exact.samples == comparison["fine-tune"].samples
        assert exact.file_bytes == (folder / "exact.safetensors").stat().st_size
        assert exact.projection_bytes > poor.projection_bytes
        assert comparison.gain_kept(exact) == 1
        assert comparison.gain_kept(comparison["base"]) == 0

    def test_json_holds_everything(self, comparison):
        content = json.loads(json.dumps(comparison.to_json()))
        assert [row["name"] for row in content["candidates"]] == ["base", "fine-tune", "exact", "poor"]
        assert content["candidates"][2]["task"] == {
            "correct": 4, "total": 5, "accuracy": 0.8, "interval": list(comparison["exact"].task.interval),
        }  # fmt: skip
        assert content["candidates"][3]["text"]["kl"] == comparison["poor"].text.kl

    def test_is_deterministic(self, comparison, folder):
        again = compare(
            folder / "base", folder / "tuned", [folder / "poor.safetensors"], text=folder / "text.txt",
            tasks=folder / "tasks.jsonl", sequence_length=30, sequences=8,
        )  # fmt: skip
        assert again["poor"] == comparison["poor"]

    def test_sizes_alone(self, folder):
        comparison = compare(folder / "base", folder / "tuned", [folder / "poor.safetensors"])
        assert comparison["poor"].text is None
        assert comparison["poor"].task is None
        assert comparison.gain_kept(comparison["poor"]) is None

    def test_another_base(self, folder):
        with pytest.raises(CheckpointError, match="is not the base"):
            compare(folder / "tuned", folder / "tuned", [folder / "poor.safetensors"])

    @pytest.mark.parametrize(
        ("missing", "message"),
        [("tokenizer.json", r"has no tokenizer \(tokenizer\.json"), ("config.json", r"config\.json: missing")],
    )
    def test_incomplete_fine_tune(self, folder, tmp_path, missing, message):
        shutil.copytree(folder / "tuned", tmp_path / "tuned")
        (tmp_path / "tuned" / missing).unlink()
        with pytest.raises(DeltaweaveError, match=message):
            compare(folder / "base", tmp_path / "tuned", [folder / "poor.safetensors"])

    def test_missing_fine_tune(self, folder, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere: not a folder"):
            compare(folder / "base", tmp_path / "nowhere", [folder / "poor.safetensors"])

    def test_one_name_twice(self, folder):
        with pytest.raises(DeltaweaveError, match="poor: two rows"):
            compare(folder / "base", folder / "tuned", [folder / "poor.safetensors"] * 2)


@pytest.mark.parametrize(("file", "content"), [("config.json", "{}"), ("tokenizer.json", "{}")])
def test_what_transformers_cannot_load_is_named(folder, tmp_path, file, content):
    shutil.copytree(folder / "tuned", tmp_path / "tuned")
    (tmp_path / "tuned" / file).write_text(content)
    with pytest.raises(DeltaweaveError, match=r"tuned.*: Transformers cannot load it \(\S.*\)$"):
        compare(folder / "base", tmp_path / "tuned", [folder / "poor.safetensors"])


def test_a_base_that_lacks_tokens_gets_rows_of_zeros(folder, models):
    base = load_checkpoint(folder / "base")
    tokens = sequences(1, 12)
    with torch.no_grad():
        grown, known = models[1](tokens).logits, base(tokens).logits
    assert torch.equal(grown[..., : known.shape[-1]], known)
    assert not grown[..., known.shape[-1] :].any()
