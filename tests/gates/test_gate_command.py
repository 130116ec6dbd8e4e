# SPDX-License-Identifier: Apache-2.0
"""`deltaweave gate`: fusion files from LoRAs and deltas, baselines, heat maps, errors in one line."""

import json

import numpy as np
import pytest
import torch
from deltaweave.converter import Checkpoint
from deltaweave.formats import Delta
from deltaweave.formats.fusion import DeltaReference, FixedGate, Fusion, LoraReference
from deltaweave.formats.fusion_file import read_fusion, resolve_fusion, verify_fusion, write_fusion
from deltaweave.runtime_plugin.pytorch.fusion import attach_fusion
from family import finetune
from fusions import make_gate, make_lora, same, single
from helpers import tiny_checkpoint

import deltaweave.gates.training as training
from deltaweave.cli import main
from deltaweave.gates.baselines import HubRecipe, search_weights
from deltaweave.gates.examples import load_examples
from deltaweave.gates.experts import GateError, delta_as_lora, fusion_experts
from deltaweave.gates.look import look
from deltaweave.gates.mixture import FixedWeights, attach_mixture, weigher_of
from deltaweave.gates.training import evaluate_loss
from deltaweave.models import load_checkpoint, load_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base, two LoRAs in fusion files, a delta, and examples, all in one folder."""
    folder = tmp_path_factory.mktemp("gate")
    base = tiny_checkpoint(folder / "base")
    identity = Checkpoint.open(base).identity()
    generator = np.random.default_rng(0)
    for index, name in enumerate(("german", "maths")):
        write_fusion(folder / f"{name}.safetensors", single(make_lora(generator, 2 + index, name=name), identity))
    (folder / "made").mkdir()
    delta = finetune(base, folder / "made")
    delta.rename(folder / "code.safetensors")
    lines = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(*words, status=0):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == status


def gate(parts, command, *words, experts=("german", "maths"), status=0):
    named = [word for name in experts for word in ("--lora", parts / f"{name}.safetensors")]
    run("gate", *command, "--base", parts / "base", *named, *words, status=status)


def test_train_writes_a_fusion_that_the_runtime_takes(parts, tmp_path, capsys):
    output = tmp_path / "fusion.safetensors"
    words = ("--data", parts / "data.jsonl", "--epochs", 2, "--dev-share", 0.25, "-o", output, "--json")
    gate(parts, ["train"], *words)
    told = json.loads(capsys.readouterr().out)
    assert (told["experts"], told["steps"], len(told["dev_losses"])) == (["german", "maths"], 6, 3)
    assert (tmp_path / "fusion.loss.png").stat().st_size > 5000
    assert not (tmp_path / "fusion.safetensors.partial").exists()
    assert verify_fusion(output) == []
    fusion = read_fusion(output)
    assert fusion.method["name"] == "lora-flow"
    assert fusion.method["learning_rate"] == 1e-3
    assert fusion.training["train"]["examples"] == 9
    stored = read_fusion(parts / "german.safetensors").loras[0]
    assert all(same(fusion.loras[0].modules[name].a, matrix.a) for name, matrix in stored.modules.items())
    model = load_checkpoint(parts / "base")
    examples = load_examples(parts / "data.jsonl", load_tokenizer(parts / "base")).split(0.25, 0)[1]
    with attach_fusion(model, fusion):
        assert evaluate_loss(model, examples.examples, 0) == pytest.approx(min(told["dev_losses"]), abs=1e-4)


def test_references_and_deltas_lie_beside_the_fusion(parts):
    output = parts / "mixed.safetensors"
    words = ("--data", parts / "data.jsonl", "--epochs", 1, "--reference", "--task", "german", "-o", output, "--force")
    gate(parts, ["train"], *words, experts=("german", "code"))
    fusion = read_fusion(output)
    assert isinstance(fusion.experts[0], LoraReference)
    assert isinstance(fusion.experts[1], DeltaReference)
    assert fusion.method["task"] == "german"
    opened, loras = fusion_experts(output)
    assert [lora.name for lora in loras] == ["german", "code"]
    assert len(resolve_fusion(output).experts) == len(opened.experts) == 2


def test_a_delta_as_expert_adds_its_projections(parts):
    """Weight 1 is the base with the delta's dense projections added, by the reader's own dequantization."""
    with Delta.open(parts / "code.safetensors") as delta:
        lora = delta_as_lora(delta, "code")
        dense = {name: delta.dequantize(f"{name}.weight") for name in lora.modules}
    assert len(dense) == 14
    model, other = load_checkpoint(parts / "base"), load_checkpoint(parts / "base")
    tokens = 3 + torch.arange(20)[None]
    with torch.no_grad():
        for name, values in dense.items():
            other.get_submodule(name).weight += torch.from_numpy(values)
        with attach_mixture(model, [lora], FixedWeights([1.0])):
            torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_command_goes_on(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0.0)
    words = ("--data", parts / "data.jsonl", "--epochs", 2, "--json")
    gate(parts, ["train"], *words, "-o", tmp_path / "whole.safetensors")
    whole = json.loads(capsys.readouterr().out)
    step, calls = training._Run._step, []

    def failing(self, number):
        calls.append(number)
        if number == 4:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(training._Run, "_step", failing)
    gate(parts, ["train"], *words, "-o", tmp_path / "cut.safetensors", status=2)
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "cut.safetensors").exists()
    monkeypatch.setattr(training._Run, "_step", step)
    gate(parts, ["train"], *words, "-o", tmp_path / "cut.safetensors")
    cut = json.loads(capsys.readouterr().out)
    assert cut["resumed_at"] == 4
    assert cut["losses"] == whole["losses"]
    first, second = (read_fusion(tmp_path / f"{name}.safetensors").gate for name in ("whole", "cut"))
    assert all(same(first.blocks[name].weight, second.blocks[name].weight) for name in first.blocks)


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [("average", (), (0.5, 0.5)), ("single", (), (0.0, 1.0)), ("single", ("--task", "german"), (1.0, 0.0))],
)
def test_baselines(parts, tmp_path, capsys, kind, words, expected):
    output = tmp_path / "fixed.safetensors"
    gate(parts, ["baseline", kind], *words, "-o", output, "--json")
    assert tuple(json.loads(capsys.readouterr().out)["weights"].values()) == expected
    assert read_fusion(output).gate == FixedGate(expected)


def test_lorahub_finds_better_weights_than_its_start(parts, tmp_path, capsys):
    output = tmp_path / "hub.safetensors"
    gate(parts, ["baseline", "lorahub"], "--data", parts / "data.jsonl", "-o", output, "--json")
    weights = tuple(json.loads(capsys.readouterr().out)["weights"].values())
    model, tokenizer = load_checkpoint(parts / "base"), load_tokenizer(parts / "base")
    examples = load_examples(parts / "data.jsonl", tokenizer)
    loras = fusion_experts(output)[1]
    found = search_weights(model, loras, examples, HubRecipe())
    assert found.weights == weights
    assert len(found.history) <= 40
    assert found.history[0][0] == (0.0, 0.0)
    assert found.objective == min(value for _, value in found.history) < found.history[0][1]
    assert all(abs(weight) <= 1.5 for weight in weights)
    with attach_mixture(model, loras, FixedWeights(weights)):
        loss = evaluate_loss(model, examples.examples, 0)
    assert found.objective == pytest.approx(loss + 0.05 * sum(map(abs, weights)) / 2, rel=1e-6)


def token_fusion(parts, path):
    generator = np.random.default_rng(3)
    loras = tuple(make_lora(generator, 2, name=name) for name in ("german", "maths", "code"))
    base = read_fusion(parts / "german.safetensors")
    fusion = Fusion(
        "deltaweave 0.1.0", base.base, base.architecture, {"name": "lora-flow"}, loras, make_gate(generator, 3)
    )
    return write_fusion(path, fusion)


def test_show_has_the_gates_weights(parts, tmp_path, capsys):
    """Against the equation in float64 at the first block, whose input is the embedding."""
    path = token_fusion(parts, tmp_path / "fusion.safetensors")
    run("gate", "show", path, "--base", parts / "base", "--prompt", "1 + 1 =", "--new-tokens", 3, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"][:7] == list("1 + 1 =")
    assert told["prompt_tokens"] == 7
    model, tokenizer = load_checkpoint(parts / "base"), load_tokenizer(parts / "base")
    block = read_fusion(path).gate.blocks["model.layers.0"]
    ids = tokenizer("1 + 1 =")["input_ids"]
    x = model.get_input_embeddings().weight[ids].detach().double().numpy()
    logits = x @ block.weight.to_float32().astype(np.float64).T / 1.1
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    expected = powers / powers.sum(-1, keepdims=True) + block.bias.to_float32()
    found = np.array([told["weights"][name][0][:7] for name in ("german", "maths", "code")]).T
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["map.png", "map.html"])
def test_show_draws_a_heat_map(parts, tmp_path, capsys, name):
    path = token_fusion(parts, tmp_path / "fusion.safetensors")
    run("gate", "show", path, "--base", parts / "base", "--prompt", "2 * 3 = <b>", "-o", tmp_path / name)
    assert "german: mean" in capsys.readouterr().out
    content = (tmp_path / name).read_bytes()
    if name.endswith("png"):
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    else:
        assert b"layer" in content
        assert b"maths: mean" in content


def test_fixed_weights_are_the_same_everywhere(parts, tmp_path):
    output = tmp_path / "average.safetensors"
    gate(parts, ["baseline", "average"], "-o", output)
    found = look(output, parts / "base", "1 + 1")
    assert found.weights.shape == (2, 2, 5)
    assert (found.weights == 0.5).all()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (["train"], ("--data", "none.jsonl"), "none.jsonl: not readable"),
        (["train"], ("--data", "{data}", "--task", "cooking"), "expert 'cooking', expected one of german, maths"),
        (["train"], ("--data", "{data}", "--dev", "{data}", "--dev-share", "0.5"), "not from both"),
        (["train"], ("--data", "{data}", "--chat"), "needs a chat template"),
        (["train"], ("--data", "{data}", "--reference"), "a fusion names files beside itself"),
        (["train"], ("--data", "{data}", "--lora", "{german}"), "two experts are called german"),
        (["train"], ("--data", "{data}", "--lora", "{data}"), "data.jsonl"),
        (["train"], ("--data", "{data}", "--lora", "{code}"), "a fusion names files beside itself"),
        (["baseline", "lorahub"], (), "--data is missing"),
        (["baseline", "median"], (), "expected one of average, lorahub, single"),
    ],
)
def test_errors_are_one_line(parts, tmp_path, capsys, command, words, message):
    files = {"data": parts / "data.jsonl", "german": parts / "german.safetensors", "code": parts / "code.safetensors"}
    words = [word.format(**files) for word in words]
    gate(parts, command, *words, "-o", tmp_path / "out.safetensors", status=2)
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert told[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_experts_of_another_base_are_refused(parts, tmp_path, capsys):
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    for name in ("german", "code"):
        words = (
            "--lora",
            parts / f"{name}.safetensors",
            "--lora",
            parts / "maths.safetensors",
            "-o",
            tmp_path / "x.safetensors",
        )
        run("gate", "baseline", "average", "--base", other, *words, status=2)
        assert f"{name}.safetensors: " in (told := capsys.readouterr().err)
        assert "root" in told
    path = token_fusion(parts, tmp_path / "fusion.safetensors")
    run("gate", "show", path, "--base", other, "--prompt", "1", status=2)
    assert "is not the base" in capsys.readouterr().err


def test_an_existing_output_is_left_alone(parts, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    gate(parts, ["baseline", "average"], "-o", output, status=2)
    assert "--force" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    gate(parts, ["baseline", "average"], "-o", output, "--force")
    assert read_fusion(output).gate == FixedGate((0.5, 0.5))


def test_deltas_without_factored_projections_are_refused(parts):
    class Stub:
        path = "delta.safetensors"

        def records(self):
            with Delta.open(parts / "code.safetensors") as delta:
                name = next(name for name in delta.names if name.endswith("norm.weight"))
                return [("model.layers.0.self_attn.q_proj.weight", delta.record(name))]

    with pytest.raises(GateError, match="expected a factored delta"):
        delta_as_lora(Stub(), "code")


def test_mixed_experts_are_the_runtimes(parts, tmp_path):
    """A LoRA and a delta under token gates, against the runtime's reference of the same file."""
    output = parts / "joined.safetensors"
    words = ("--data", parts / "data.jsonl", "--epochs", 2, "--learning-rate", 0.05, "-o", output, "--force")
    gate(parts, ["train"], *words, experts=("german", "code"))
    model, tokens = load_checkpoint(parts / "base"), 3 + torch.arange(20)[None]
    fusion, loras = fusion_experts(output)
    with torch.no_grad():
        with attach_mixture(model, loras, weigher_of(fusion.gate)):
            found = model(tokens).logits
        with attach_fusion(model, resolve_fusion(output)):
            torch.testing.assert_close(model(tokens).logits, found, rtol=1e-4, atol=1e-4)
