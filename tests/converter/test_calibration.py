# SPDX-License-Identifier: Apache-2.0
"""Calibration text and the streamed decoder, against Transformers' own forward."""

import json

import pytest
import torch
from deltaweave.converter import CalibrationError, Checkpoint
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.families import family_of
from deltaweave.converter.text import CalibrationData, default_sequence_length
from helpers import FAMILIES, tiny_checkpoint
from transformers import AutoModelForCausalLM


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    tiny_checkpoint(tmp_path / "model", family=request.param, dtype=torch.float32)
    return Checkpoint.open(tmp_path / "model")


def stream_and_inputs(checkpoint, tmp_path, samples=3, length=24):
    stream = BlockStream(checkpoint, length, torch.device("cpu"))
    tokens = torch.randint(4, 40, (samples, length), generator=torch.Generator().manual_seed(0))
    shape = (samples, length, int(checkpoint.config["hidden_size"]))
    inputs = Activations.create(tmp_path / "a.bin", shape, stream.dtype, torch.device("cpu"))
    stream.embed(tokens, inputs)
    return stream, tokens, inputs


def test_blocks_equal_the_model(checkpoint, tmp_path):
    stream, tokens, inputs = stream_and_inputs(checkpoint, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    hidden = torch.cat([chunk for _, chunk in inputs.chunks()])
    assert torch.equal(hidden, expected[0])
    for layer in range(
        int(checkpoint.config["num_hidden_layers"]) - 1
    ):  # the last one is returned behind the final norm
        stream.load(layer)
        hidden = stream.forward(layer, hidden)
        stream.unload(layer)
        assert torch.allclose(hidden, expected[layer + 1], atol=1e-5)


@pytest.mark.parametrize("module", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_second_moment_equals_a_hook_on_the_model(checkpoint, tmp_path, module):
    stream, tokens, inputs = stream_and_inputs(checkpoint, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    seen = []
    model.get_submodule(f"model.layers.0.{module}").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    x = seen[0].flatten(0, -2).double()
    stream.load(0)
    projections = family_of(checkpoint).projections(checkpoint)[0]
    (projection,) = (p for stage in projections for p in stage if p.module == module)
    attention = projections[0][0].half
    if projection.half != attention:
        for rows, hidden in inputs.chunks():
            inputs.write(rows, stream.through_half(0, attention, hidden))
    hessian = stream.second_moment(projection, inputs)
    assert torch.allclose(hessian.double(), 2 / len(tokens) * x.T @ x, rtol=1e-4, atol=1e-5)


def test_unloaded_block_holds_no_memory(checkpoint, tmp_path):
    stream, _, _ = stream_and_inputs(checkpoint, tmp_path)
    block = stream.load(0)
    stream.unload(0)
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}


@pytest.fixture
def folder(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    return tmp_path / "model"


TEXT = "the quick brown fox jumps over the lazy dog. " * 20


def load(source, folder, samples=4, length=16, seed=0):
    return CalibrationData.load(source, folder, samples, length, seed)


def test_windows_are_drawn_by_seed(folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    one, again, other = load(file, folder), load(file, folder), load(file, folder, seed=1)
    assert one.tokens.shape == (4, 16)
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    assert (one.source, len(one.sha256)) == ("text.txt", 64)


def test_jsonl_forms_give_the_text_they_hold(folder, tmp_path):
    plain, pairs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    plain.write_text(json.dumps({"text": TEXT}) + "\n")
    pairs.write_text(json.dumps({"prompt": TEXT[:50], "answer": TEXT[50:]}) + "\n\n")
    assert torch.equal(load(plain, folder).tokens, load(pairs, folder).tokens)


def test_default_text_is_shipped(folder):
    assert load("default", folder, length=64).tokens.shape == (4, 64)


def test_default_sequence_length():
    assert default_sequence_length({"max_position_embeddings": 4096}) == 2048
    assert default_sequence_length({"max_position_embeddings": 128}) == 128
    assert default_sequence_length({}) == 2048


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"short", r"a.txt: holds \d+ tokens, fewer than one sequence of 16"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt: not UTF-8 at byte 0"),
        ("a.jsonl", b"{}\n", "a.jsonl:1: has neither"),
        ("a.jsonl", b'{"text": "x"}\n[', "a.jsonl:2: not JSON"),
        ("a.csv", b"x", "must be .txt, .jsonl"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "a.jsonl:1: has messages, but the tokenizer",
        ),
    ],
)
def test_unusable_text_is_named(folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / name, folder)


def test_missing_text(folder, tmp_path):
    with pytest.raises(CalibrationError, match=r"gone.txt: not readable \(No such file"):
        load(tmp_path / "gone.txt", folder)


def test_missing_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(CalibrationError, match="empty: no usable tokenizer"):
        load(tmp_path / "a.txt", tmp_path / "empty")
