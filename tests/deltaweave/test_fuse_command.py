# SPDX-License-Identifier: Apache-2.0
"""`deltaweave fuse`, and `inspect` and `verify` of fusion files: what is written, and errors in one line."""

import json
import re

import numpy as np
import peft
import pytest
import torch
from deltaweave.converter import Checkpoint
from deltaweave.formats.fusion import DeltaReference, FixedGate, LoraReference, TokenGate
from deltaweave.formats.fusion_file import read_fusion, write_fusion
from family import finetune
from fusions import make_lora, single
from helpers import tiny_checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from deltaweave.cli import main


def run(*words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with one line, which is returned."""

    def check(*words):
        capsys.readouterr()
        assert run(*words) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return check


def adapter(base, folder, **settings):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def released_gate(path, layers=2, experts=2, hidden=64):
    tensors = {}
    for layer in range(layers):
        tensors[f"encoder.layers.{layer}.lora_fusion_gate.weight"] = torch.randn(experts, hidden)
        tensors[f"encoder.layers.{layer}.lora_fusion_gate.weight_bias"] = torch.zeros(experts)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base, a larger one, PEFT folders `a`, `b`, `dora` and `wide`, a fusion file of one LoRA, and a delta."""
    folder = tmp_path_factory.mktemp("fuse")
    base = tiny_checkpoint(folder / "base")
    adapter(base, folder / "a", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter(base, folder / "b", r=2, lora_alpha=2, target_modules=["v_proj"])
    adapter(base, folder / "dora", r=2, target_modules=["v_proj"], use_dora=True)
    adapter(tiny_checkpoint(folder / "big", hidden=128), folder / "wide", r=2, target_modules=["v_proj"])
    adapter(tiny_checkpoint(folder / "deep", layers=3), folder / "tall", r=2, target_modules=["v_proj"])
    lora = make_lora(np.random.default_rng(0), 3, name="maths")
    write_fusion(folder / "maths.safetensors", single(lora, Checkpoint.open(base).identity()))
    (folder / "made").mkdir()
    finetune(base, folder / "made").rename(folder / "code.safetensors")
    return folder


def fuse(parts, *words, experts=("a", "b"), output="out.safetensors"):
    named = [word for name in experts for word in ("--lora", parts / name)]
    return ("fuse", "--base", parts / "base", *named, "-o", parts / output, "--force", *words)


def test_weights_and_average(parts, capsys):
    assert run(*fuse(parts, "--weights", ".7,.3", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.7, 0.3]
    fusion = read_fusion(parts / "out.safetensors")
    assert fusion.gate == FixedGate((0.7, 0.3))
    assert [lora.name for lora in fusion.loras] == ["a", "b"]
    assert fusion.base.root == Checkpoint.open(parts / "base").identity().root
    assert run(*fuse(parts)) == 0
    assert read_fusion(parts / "out.safetensors").gate == FixedGate((0.5, 0.5))


def test_released_gate(parts):
    gate = released_gate(parts / "gate.safetensors")
    assert run(*fuse(parts, "--gate", gate, "--temperature", 1.1)) == 0
    found = read_fusion(parts / "out.safetensors").gate
    assert isinstance(found, TokenGate)
    assert (len(found.blocks), found.temperature) == (2, 1.1)


def test_inspect(parts, capsys):
    words = ("--delta", parts / "code.safetensors", "--reference", "--gate", released_gate(parts / "gate.safetensors"))
    assert run(*fuse(parts, *words, experts=["maths.safetensors"])) == 0
    capsys.readouterr()
    assert run("inspect", parts / "out.safetensors", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    named = read_fusion(parts / "out.safetensors").experts
    assert isinstance(named[0], LoraReference)
    assert isinstance(named[1], DeltaReference)
    assert [(e["name"], e["kind"], e["path"], e["header_sha256"]) for e in told["experts"]] == [
        ("maths", "reference", "maths.safetensors", named[0].header_sha256),
        ("code", "delta", "code.safetensors", named[1].header_sha256),
    ]
    gate = {"kind": "token", "layers": 2, "hidden_size": 64, "temperature": 1.0, "dtype": "F32"}
    assert told["gate"] == gate
    assert run("inspect", parts / "out.safetensors") == 0
    assert "gates of 2 layers" in capsys.readouterr().out

    assert run(*fuse(parts)) == 0
    capsys.readouterr()
    assert run("inspect", parts / "out.safetensors", "--json") == 0
    first = json.loads(capsys.readouterr().out)["experts"][0]
    assert (first["kind"], first["ranks"], first["modules"]) == ("lora", [4], 4)
    assert first["targets"] == ["down_proj", "q_proj"]
    assert run("inspect", parts / "out.safetensors") == 0
    assert re.search(r"a +lora +4 +4 +down_proj, q_proj", capsys.readouterr().out)


def test_verify_follows_references(parts, tmp_path, capsys):
    """A fusion beside copies of what it names: whole, then with each of them damaged, exchanged, or gone."""
    for name in ("maths", "code"):
        (tmp_path / f"{name}.safetensors").write_bytes((parts / f"{name}.safetensors").read_bytes())
    output = tmp_path / "f.safetensors"
    words = ["fuse", "--base", parts / "base", "--lora", tmp_path / "maths.safetensors", "--reference", "-o", output]
    assert run(*words, "--delta", tmp_path / "code.safetensors") == 0

    def verify(*more):
        capsys.readouterr()
        status = run("verify", output, *more, "--json")
        return status, {check["name"]: check for check in json.loads(capsys.readouterr().out) if not check["passed"]}

    assert verify("--base", parts / "base") == (0, {})
    status, failed = verify("--base", parts / "big")
    assert (status, set(failed)) == (1, {"base"})
    for name in ("maths", "code", "f"):
        path = tmp_path / f"{name}.safetensors"
        whole = path.read_bytes()
        if name != "f":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            status, failed = verify()
            assert (status, set(failed)) == (1, {"expert"})
            assert f"{name}.safetensors" in failed["expert"]["detail"]
            path.unlink()
            assert verify()[0] == 1
        path.write_bytes(whole)
    assert verify() == (0, {})
    (tmp_path / "maths.safetensors").write_bytes((parts / "maths.safetensors").read_bytes().replace(b"maths", b"mathe"))
    assert "another file" in verify()[1]["expert"]["detail"]


def test_verify_inlined(parts, capsys):
    assert run(*fuse(parts)) == 0
    path = parts / "out.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    capsys.readouterr()
    assert run("verify", path) == 1
    assert "checksum does not match" in capsys.readouterr().out


def test_errors(parts, refused):
    assert "2 weights for 1 experts" in refused(*fuse(parts, "--weights", "1,1", experts=["a"]))
    assert "expected numbers" in refused(*fuse(parts, "--weights", "1,x"))
    assert "finite" in refused(*fuse(parts, "--weights", "1,inf"))
    assert "DoRA is not supported" in refused(*fuse(parts, experts=["dora", "a"]))
    assert "model.layers.0.self_attn.v_proj has shape [64, 128]" in refused(*fuse(parts, experts=["wide"]))
    assert "model.layers.2.self_attn.v_proj is no layer" in refused(*fuse(parts, experts=["tall"]))
    gate = parts / "odd.safetensors"
    message = refused(*fuse(parts, "--gate", released_gate(gate, layers=3)))
    assert "gates of 3 layers, the base has 2" in message
    assert "hidden_size 32, the base has 64" in refused(*fuse(parts, "--gate", released_gate(gate, hidden=32)))
    assert "weigh 3 experts, 2 were given" in refused(*fuse(parts, "--gate", released_gate(gate, experts=3)))
    assert "not by both" in refused(*fuse(parts, "--gate", released_gate(gate), "--weights", "1,1"))
    assert "temperature" in refused(*fuse(parts, "--gate", gate, "--temperature", 0))
    assert "at least one --lora" in refused(*fuse(parts, experts=[]))
    assert run(*fuse(parts)) == 0
    assert "no fine-tune" in refused(
        "verify", parts / "out.safetensors", "--base", parts / "base", "--tuned", parts / "base"
    )
    words = ["fuse", "--base", parts / "big", "--lora", parts / "maths.safetensors", "-o", parts / "x.safetensors"]
    assert "LoRA of base" in refused(*words)
    assert not (parts / "x.safetensors").exists()
