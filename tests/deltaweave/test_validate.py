# SPDX-License-Identifier: Apache-2.0
"""`validate` against plain arithmetic, and its thresholds with all that can go wrong in them."""

import json
import math
import sys
from itertools import zip_longest
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from deltaweave.converter import Checkpoint, CheckpointError, CompressionOptions, Policies, Recipe, compress
from deltaweave.formats import Delta, DeltaweaveError, read_fusion, write_fusion
from family import edit_config
from fusions import make_fusion
from helpers import perturbed, tiny_checkpoint, tiny_tokenizer

from deltaweave.models import load_checkpoint, load_tuned
from deltaweave.validation import METRICS, ModelSubject, Outputs, Thresholds, load_prompts, validate, validate_subject

FULL = CompressionOptions(Recipe(bands="16:full", ratio=1.0), "none", policies=Policies("exact", "exact"))
POOR = CompressionOptions(Recipe(bands="2:8", ratio=1 / 2, group_size=128), "none")
PROMPTS = [{"prompt": "the quick brown"}, {"prompt": "12+", "answer": "34=46"}, {"prompt": "a lazy dog jumps"}]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair, prompts, and two deltas: an exact one and a poor one."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    tuned = perturbed(base, folder / "tuned", added_tokens=2)
    compress(base, tuned, folder / "exact.safetensors", FULL)
    compress(base, tuned, folder / "poor.safetensors", POOR)
    (folder / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, PROMPTS)))
    return folder


def run(folder, delta="poor", **settings):
    settings = {"references": ["float32"], "dtype": "float32", "max_new_tokens": NEW, "device": "cpu", **settings}
    return validate(
        folder / f"{delta}.safetensors", base=folder / "base", tuned=folder / "tuned",
        prompts=folder / "prompts.jsonl", **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def poor(folder):
    return run(folder)


@torch.no_grad()
def plain_greedy(model, tokens, most):
    """One token after another, without a cache, up to the tokenizer's end token."""
    text, end = list(tokens), tiny_tokenizer().convert_tokens_to_ids("<eos>")
    for _ in range(most):
        token = int(model(torch.tensor([text])).logits[0, -1].argmax())
        if token == end:
            break
        text.append(token)
    return text[len(tokens) :]


@pytest.fixture(scope="module")
def oracle(folder):
    """The definitions, from two dense models, token by token."""
    tuned = load_checkpoint(folder / "tuned")
    with Delta.open(folder / "poor.safetensors") as delta:
        candidate = load_tuned(Checkpoint.open(folder / "base"), delta)
    kls, agreed, losses, own_losses, divergences = [], [], [], [], []
    logit_sums, layer_sums = torch.zeros(2, dtype=torch.double), torch.zeros(2, 2, dtype=torch.double)
    for entry in PROMPTS:
        ids = tiny_tokenizer()(entry["prompt"])["input_ids"]
        expected, found = (plain_greedy(model, ids, NEW) for model in (tuned, candidate))
        pairs = list(zip_longest(expected, found))
        divergences.append(next((place for place, (a, b) in enumerate(pairs) if a != b), None))
        answer = tiny_tokenizer()(entry["answer"])["input_ids"] if "answer" in entry else expected
        row = torch.tensor([[*ids, *answer]])
        with torch.no_grad():
            outputs = [model(row, output_hidden_states=True) for model in (tuned, candidate)]
        p, q = (output.logits[0, :-1].double().log_softmax(-1) for output in outputs)
        kls.append((p.exp() * (p - q)).sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).double())
        for sums, log in ((own_losses, p), (losses, q)):
            sums.append(torch.stack([-log[place, token] for place, token in enumerate(row[0, 1:])]))
        a, b = p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True)
        logit_sums += torch.stack([(a - b).square().sum(), a.square().sum()])
        # Of Hugging Face's hidden states the last one stands behind the final norm: the first block's is compared.
        wanted, got = (output.hidden_states[1][0].double() for output in outputs)
        layer_sums[0] += torch.stack([(wanted - got).square().sum(), wanted.square().sum()])
    return SimpleNamespace(
        kl=float(torch.cat(kls).mean()),
        worst_kl=max(float(kl.mean()) for kl in kls),
        top1=float(torch.cat(agreed).mean()),
        perplexity_ratio=math.exp(float(torch.cat(losses).mean() - torch.cat(own_losses).mean())),
        logit_error=math.sqrt(logit_sums[0] / logit_sums[1]),
        first_layer=math.sqrt(layer_sums[0, 0] / layer_sums[0, 1]),
        tokens=sum(map(len, kls)),
        divergences=divergences,
    )


class TestNumbers:
    def test_are_their_definitions(self, poor, oracle):
        measured, metrics = poor.measurements["float32"], poor.metrics("float32")
        assert measured.text.tokens == oracle.tokens
        for name in ("kl", "worst_kl", "top1", "perplexity_ratio", "logit_error"):
            assert metrics[name] == pytest.approx(getattr(oracle, name), rel=1e-3), name
        assert measured.layers[0] == pytest.approx(oracle.first_layer, rel=1e-3)
        assert len(measured.layers) == 2
        assert metrics["layer_error"] == max(measured.layers)
        assert [prompt.divergence for prompt in measured.prompts] == oracle.divergences
        parted = [place for place in oracle.divergences if place is not None]
        assert parted, "the poor delta is too good to test with"
        assert metrics["first_divergence"] == min(parted)
        assert metrics["greedy_match"] == pytest.approx(1 - len(parted) / len(PROMPTS))

    def test_an_exact_delta_is_the_fine_tune(self, folder):
        validation = run(folder, "exact")
        metrics = validation.metrics("float32")
        assert metrics["kl"] < 1e-6
        assert metrics["layer_error"] < 1e-3
        assert (metrics["top1"], metrics["greedy_match"], metrics["first_divergence"]) == (1, 1, math.inf)
        for expected, found in validation.texts["float32"]:
            assert expected == found

    def test_16_bit_references_and_subjects(self, folder):
        validation = run(folder, "exact", references=None, dtype="float16")
        assert list(validation.measurements) == ["float16", "float32"]
        near, far = (validation.metrics(reference)["logit_error"] for reference in ("float16", "float32"))
        assert 0 < near < 0.02
        assert 0 < far < 0.02

    def test_the_arena_computes_the_same(self, folder, poor, native):
        """Libdeltaweave's arena, with a vocabulary that the fine-tune brings."""
        served = run(folder, host="arena").metrics("float32")
        for name, value in poor.metrics("float32").items():
            assert served[name] == pytest.approx(value, rel=2e-3), name

    def test_json_holds_numbers_only(self, folder, poor):
        content = json.loads(json.dumps(poor.to_json(), allow_nan=False))
        assert content["references"]["float32"]["metrics"]["kl"] == poor.metrics("float32")["kl"]
        assert [prompt["prompt"] for prompt in content["references"]["float32"]["prompts"]] == [
            entry["prompt"] for entry in PROMPTS
        ]
        exact = json.loads(json.dumps(run(folder, "exact").to_json(), allow_nan=False))
        assert exact["references"]["float32"]["metrics"]["first_divergence"] is None

    def test_texts_end_at_any_stop_token(self, folder, tmp_path):
        """The fine-tune's own settings may name several."""
        tuned = load_checkpoint(folder / "tuned")
        ids = tiny_tokenizer()(PROMPTS[0]["prompt"])["input_ids"]
        text = plain_greedy(tuned, ids, NEW)
        place = next(index for index in range(1, NEW) if text[index] not in text[:index])
        tuned.generation_config.eos_token_id = [1, text[place]]
        tuned.save_pretrained(tmp_path)
        tiny = json.loads((folder / "tuned" / "config.json").read_text())
        edit_config(tmp_path, vocab_size=tiny["vocab_size"])
        for file in (folder / "tuned").glob("tokenizer*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        validation = validate(
            folder / "exact.safetensors", base=folder / "base", tuned=tmp_path, prompts=folder / "prompts.jsonl",
            references=["float32"], dtype="float32", max_new_tokens=NEW, limit=1, device="cpu",
        )  # fmt: skip
        assert validation.measurements["float32"].prompts[0].expected == tuple(text[:place])


class Fake:
    """The fine-tune's logits, changed; greedy text as told."""

    def __init__(self, model, change=lambda logits: logits, text=lambda text: text):
        self._own, self._change, self._text = ModelSubject(model), change, text

    def outputs(self, tokens):
        return Outputs(self._change(self._own.outputs(tokens).logits), ())

    def greedy(self, prompts, most, stop):
        return [self._text(text) for text in self._own.greedy(prompts, most, stop)]


class TestAnySubject:
    @pytest.fixture(scope="class")
    def tuned(self, folder):
        return load_checkpoint(folder / "tuned")

    def run(self, folder, subject, **settings):
        settings = {"references": ["float32"], "max_new_tokens": NEW, "device": "cpu", **settings}
        return validate_subject(subject, "fake", tuned=folder / "tuned", prompts=folder / "prompts.jsonl", **settings)

    def test_a_wider_vocabulary_is_cut(self, folder, tuned):
        def wider(logits):
            return torch.nn.functional.pad(logits, (0, 6), value=-math.inf)

        metrics = self.run(folder, Fake(tuned, wider)).metrics("float32")
        assert (metrics["kl"], metrics["logit_error"], metrics["layer_error"]) == (0, 0, None)

    def test_a_smaller_vocabulary_is_refused(self, folder, tuned):
        with pytest.raises(DeltaweaveError, match="vocabulary has 57 tokens, the fine-tune's 58"):
            self.run(folder, Fake(tuned, lambda logits: logits[:, :-1]))

    @pytest.mark.parametrize(
        ("change", "place"),
        [
            (lambda text: [*text[:4], 3 + text[4] % 20, *text[5:]], 4),
            (lambda text: text[:7], 7),
            (lambda text: [*text, 3], NEW),
            (lambda text: [], 0),
            (lambda text: text, None),
        ],
    )
    def test_where_texts_part(self, folder, tuned, change, place):
        (prompt,) = self.run(folder, Fake(tuned, text=change), limit=1).measurements["float32"].prompts
        assert len(prompt.expected) == NEW, "the fine-tune ends too early to test with"
        assert prompt.divergence == place

    def test_what_is_no_number_keeps_no_limit(self, folder, tuned):
        limits = {"kl": 9.0, "worst_kl": 9.0, "logit_error": 9.0, "top1": 0.99, "perplexity_ratio": 9.0}
        broken = Fake(tuned, lambda logits: logits * math.nan)
        validation = self.run(folder, broken, thresholds=Thresholds.model_validate({"float32": limits}))
        assert {check.metric for check in validation.broken} == set(limits)

    def test_one_prompt_of_nan_among_good_ones(self, folder, tuned):
        """The worst prompt is the one without numbers, wherever it stands."""
        calls = iter([1.0, math.nan, 1.0])
        validation = self.run(
            folder, Fake(tuned, lambda logits: logits * next(calls)),
            thresholds=Thresholds.model_validate({"float32": {"worst_kl": 9.0}}),
        )  # fmt: skip
        assert not validation.passed

    def test_a_limit_of_what_cannot_be_seen_is_refused(self, folder, tuned):
        limits = Thresholds.model_validate({"float32": {"layer_error": 0.5}})
        with pytest.raises(DeltaweaveError, match=r"threshold float32\.layer_error: cannot be measured here"):
            self.run(folder, Fake(tuned), thresholds=limits)


class TestThresholds:
    def test_limits_are_held_from_their_side(self, folder, poor):
        """A limit at the value is kept; a hair beyond it is broken."""
        values = {name: value for name, value in poor.metrics("float32").items() if name != "first_divergence"}
        values["first_divergence"] = int(poor.metrics("float32")["first_divergence"])
        for step, kept in ((0, True), (1e-9, False)):
            limits = {name: value - step if METRICS[name].at_most else value + step for name, value in values.items()}
            limits["first_divergence"] = values["first_divergence"] + (0 if kept else 1)
            thresholds = Thresholds.model_validate({"float32": limits})
            checks = list(thresholds.check("float32", poor.measurements["float32"]))
            assert [check.metric for check in checks] == list(METRICS)
            assert {check.passed for check in checks} == {kept}

    def test_a_file_chooses_the_references(self, folder, tmp_path):
        file = tmp_path / "limits.yaml"
        file.write_text("float32:\n  kl: 0.5\n  first_divergence: 0\n")
        validation = run(folder, references=None, thresholds=file)
        assert list(validation.measurements) == ["float32"]
        assert [check.metric for check in validation.checks] == ["kl", "first_divergence"]

    def test_a_limit_against_what_is_not_measured(self, folder):
        limits = Thresholds.model_validate({"float16": {"kl": 1.0}})
        with pytest.raises(DeltaweaveError, match="limits against float16, which is not among the references"):
            run(folder, thresholds=limits)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("float32: {kl: 0.1, klx: 1}", r"float32\.klx: Extra inputs"),
            ("float64: {kl: 0.1}", r"float64: Extra inputs"),
            ("float32: {top1: 1.5}", r"float32\.top1: Input should be less"),
            ("float32: {kl: -1}", r"float32\.kl: Input should be greater"),
            ("float32: {kl: .nan}", r"float32\.kl: Input should be a finite"),
            ("float32: {kl: '0.1'}", r"float32\.kl: Input should be a valid number"),
            ("float32: {first_divergence: 1.5}", r"float32\.first_divergence: Input should be a valid integer"),
            ("float32: {}", "sets no limit; known are kl"),
            ("", "the file: Input should be"),
            ("- kl", "the file: Input should be"),
            ("float32: [", "not readable as YAML"),
        ],
    )
    def test_unusable_files(self, tmp_path, content, message):
        file = tmp_path / "limits.yaml"
        file.write_text(content)
        with pytest.raises(DeltaweaveError, match=rf"limits\.yaml: .*{message}|limits\.yaml: {message}"):
            Thresholds.from_yaml(file)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(DeltaweaveError, match=r"none\.yaml: not readable as YAML"):
            Thresholds.from_yaml(tmp_path / "none.yaml")


class FakeEngine:
    """What `validate` asks of an engine, computed by the dense model; logits as wide as the engine's vocabulary."""

    log: ClassVar[list] = []

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.log.append("closed")

    def add(self, delta, name, *, accept_base):
        self.log.append((delta.path.name, name, accept_base))
        self.model = load_tuned(Checkpoint.open(self.folder), delta)

    @torch.no_grad()
    def logits(self, tokens, tenant):
        assert tenant == self.log[0][1]
        logits = self.model(torch.tensor([tokens])).logits[0]
        return torch.nn.functional.pad(logits, (0, 3), value=-math.inf).numpy()

    def run(self, requests):
        done = []
        for request in requests:
            assert request.tenant == self.log[0][1]
            assert request.stop == {tiny_tokenizer().eos_token_id}
            done.append(SimpleNamespace(tokens=plain_greedy(self.model, request.tokens, request.max_new_tokens)))
        return done


class TestEngine:
    @pytest.fixture
    def engine(self, monkeypatch):
        """TensorRT's place taken; whether its packages are there or not."""
        module = SimpleNamespace(Engine=FakeEngine)
        monkeypatch.setitem(sys.modules, "deltaweave.runtime_plugin.trt.engine", module)
        monkeypatch.setattr(FakeEngine, "log", [])

    def run(self, folder, **settings):
        settings = {"engine": folder / "base", "max_new_tokens": NEW, "device": "cpu", **settings}
        return validate(
            folder / "poor.safetensors", tuned=folder / "tuned", prompts=folder / "prompts.jsonl", **settings
        )

    def test_measures_as_pytorch_does(self, folder, poor, engine):
        validation = self.run(folder, references=["float32"], accept_base=True)
        assert FakeEngine.log == [("poor.safetensors", "validated", True), "closed"]
        assert validation.subject == "poor.safetensors (base)"
        metrics = validation.metrics("float32")
        assert metrics.pop("layer_error") is None
        for name, value in metrics.items():
            assert value == pytest.approx(poor.metrics("float32")[name], rel=2e-3), name

    def test_is_held_against_float16_if_nothing_is_said(self, folder, engine):
        assert list(self.run(folder).measurements) == ["float16"]
        limits = Thresholds.model_validate({"float32": {"kl": 9.0}})
        assert list(self.run(folder, thresholds=limits).measurements) == ["float32"]

    def test_settings_of_pytorch_are_refused(self, folder, engine):
        for setting in ({"dtype": "float16"}, {"host": "arena"}):
            with pytest.raises(DeltaweaveError, match="are of PyTorch"):
                self.run(folder, **setting)

    def test_one_of_base_and_engine(self, folder, engine):
        for both in ({}, {"base": folder / "base", "engine": folder / "base"}):
            with pytest.raises(DeltaweaveError, match="a base folder or an engine folder, and not both"):
                self.run(folder, **{"engine": None, **both})

    def test_without_tensorrt_it_says_what_to_install(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "deltaweave.runtime_plugin.trt.engine", None)
        with pytest.raises(DeltaweaveError, match=r"engines need .*: pip install 'deltaweave\[tensorrt\]'"):
            self.run(folder)


class TestInputs:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds no prompts"),
            ("not json", r"p\.jsonl:1: expected an object"),
            ('{"prompt": "a"}\n\n[1]', r"p\.jsonl:3: expected an object"),
            ('{"answer": "a"}', r"p\.jsonl:1: expected an object with prompt"),
            ('{"prompt": 5}', r"p\.jsonl:1: prompt must be a text"),
            ('{"prompt": ""}', r"p\.jsonl:1: prompt must be a text"),
            ('{"prompt": "a", "answer": ""}', r"p\.jsonl:1: answer must be a text"),
        ],
    )
    def test_unusable_prompts(self, tmp_path, content, message):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(DeltaweaveError, match=message):
            load_prompts(tmp_path / "p.jsonl")

    def test_prompts_are_limited(self, folder):
        assert [prompt.answer for prompt in load_prompts(folder / "prompts.jsonl", 2)] == [None, "34=46"]

    def test_another_base(self, folder):
        with pytest.raises(CheckpointError, match="is not the base"):
            validate(
                folder / "poor.safetensors", base=folder / "tuned", tuned=folder / "tuned",
                prompts=folder / "prompts.jsonl", device="cpu",
            )  # fmt: skip

    def test_nothing_to_write(self, folder):
        with pytest.raises(DeltaweaveError, match="max_new_tokens 0, expected at least 1"):
            run(folder, max_new_tokens=0)


@pytest.mark.parametrize("host", ["attach", "arena"])
def test_a_fusion_is_held_against_the_reference_ops(native, folder, tmp_path, host):
    base = Checkpoint.open(folder / "base")
    path = write_fusion(tmp_path / "fusion.safetensors", make_fusion(count=2, base=base.identity()))
    settings = {"prompts": folder / "prompts.jsonl", "dtype": "float32", "max_new_tokens": NEW, "device": "cpu"}
    found = validate(path, base=base.folder, tuned=base.folder, references=["float32"], host=host, **settings)
    assert found.metrics("float32")["kl"] < 1e-6
    assert all(mine == theirs for mine, theirs in found.texts["float32"])
    bare = ModelSubject(load_checkpoint(base.folder))
    without = validate_subject(
        bare, "base", tuned=base.folder, fusion=read_fusion(path), references=["float32"],
        **{name: settings[name] for name in ("prompts", "max_new_tokens", "device")},
    )  # fmt: skip
    assert without.metrics("float32")["kl"] > 1e-3, "the fusion changes something"
    with pytest.raises(CheckpointError, match="fusion"):
        other = write_fusion(tmp_path / "other.safetensors", make_fusion(count=2))
        validate(other, base=base.folder, tuned=base.folder, host=host, **settings)
