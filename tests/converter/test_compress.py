# SPDX-License-Identifier: Apache-2.0
"""`compress` end to end on tiny models: families, exactness, resuming, refusals."""

import hashlib
import importlib
import json
import shutil
from pathlib import Path
from threading import Barrier
from time import sleep

import pytest
import torch
from deltaweave.converter import (
    Checkpoint,
    CheckpointError,
    CompressionOptions,
    OutputError,
    Policies,
    Recipe,
    RecipeError,
    ResumeError,
    apply,
    compress,
    tuned_names,
    tuned_tensor,
)
from deltaweave.converter.overlap import Overlap
from deltaweave.formats import Delta, FactoredRecord
from helpers import FAMILIES, perturbed, tiny_checkpoint
from safetensors.torch import load_file, save_file

# The package exports the function under the module's name.
compress_module = importlib.import_module("deltaweave.converter.compress")
layers_module = importlib.import_module("deltaweave.converter.layers")
calibration_module = importlib.import_module("deltaweave.converter.calibration")
QUICK = {"samples": 8, "sequence_length": 32}


def options(bands="4:4,2:*", calibration="none", ratio=3 / 4, **more):
    recipe = Recipe(bands=bands, ratio=ratio, group_size=32)
    return CompressionOptions(recipe, calibration, **{**QUICK, **more})


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog, and some numbers 0123456789. " * 40)
    return str(file)


@pytest.fixture
def pair(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    return base, perturbed(base, tmp_path / "tuned")


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_rank_sixteen_bits_reproduces_the_fine_tune(tmp_path, family, dtype):
    """Issue: 2^-9 relative per tensor for 16-bit checkpoints, 2e-3 of the delta's norm for float32."""
    base = tiny_checkpoint(
        tmp_path / "base",
        family=family,
        dtype=dtype,
        tied=family == "qwen2",
        sharded=family == "llama",
    )
    tuned = perturbed(base, tmp_path / "tuned")
    out = compress(base, tuned, tmp_path / "d.safetensors", options("16:full"))
    apply(base, out, tmp_path / "dense")
    before, expected, got = (
        Checkpoint.open(base),
        Checkpoint.open(tuned),
        Checkpoint.open(tmp_path / "dense"),
    )
    assert got.names == [name for name in expected.names if name not in expected.tied]
    for name in got.names:
        target, value = expected.tensor(name).double(), got.tensor(name).double()
        assert got.dtype(name) == expected.dtype(name)
        error = (value - target).norm()
        if dtype == torch.float32:
            delta = (target - before.tensor(name).double()).norm()
            assert error <= 2e-3 * delta, name
        else:
            assert error <= 2**-9 * target.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_checkpoint_loads_in_transformers(tmp_path, family, text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_checkpoint(tmp_path / "base", family=family, tied=family == "qwen3")
    tuned = perturbed(base, tmp_path / "tuned")
    out = compress(base, tuned, tmp_path / "d.safetensors", options(calibration=text))
    apply(base, out, tmp_path / "dense")
    tokens = torch.arange(4, 20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits.detach()
        for folder in (base, tuned, tmp_path / "dense")
    ]
    assert (logits[2] - logits[1]).norm() < 0.6 * (logits[0] - logits[1]).norm()
    AutoTokenizer.from_pretrained(tmp_path / "dense")


def test_every_projection_meets_the_ratio_and_says_its_error(pair, tmp_path, text):
    with Delta.open(compress(*pair, tmp_path / "d.safetensors", options(calibration=text))) as delta:
        factored = {name: delta.record(name) for name in delta.names if name.endswith("_proj.weight")}
        assert len(factored) == 7 * json.loads((pair[0] / "config.json").read_text())["num_hidden_layers"]
        for record in factored.values():
            assert isinstance(record, FactoredRecord)
            assert 0 < record.quality["output_error"] < 1
            assert 0 < record.quality["weight_error"] < 1
        assert delta.header.method["name"] == "delta-come"
        assert delta.header.calibration["samples"] == 8
        assert delta.verify() == []


def test_recorded_weight_error_is_the_true_one(pair, tmp_path, text):
    base, tuned = Checkpoint.open(pair[0]), Checkpoint.open(pair[1])
    with Delta.open(compress(*pair, tmp_path / "d.safetensors", options(calibration=text))) as delta:
        name = "model.layers.1.mlp.down_proj.weight"
        truth = (tuned.tensor(name).float() - base.tensor(name).float()).numpy()
        error = ((delta.dequantize(name) - truth) ** 2).sum() ** 0.5 / (truth**2).sum() ** 0.5
        assert delta.record(name).quality["weight_error"] == pytest.approx(float(error), rel=1e-3)


def test_unchanged_tensors_have_no_record(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    shutil.copytree(base, tmp_path / "tuned")
    with Delta.open(compress(base, tmp_path / "tuned", tmp_path / "d.safetensors", options())) as delta:
        assert delta.names == []
        checkpoint = Checkpoint.open(base)
        for name in tuned_names(checkpoint, delta):
            assert torch.equal(tuned_tensor(checkpoint, delta, name), checkpoint.tensor(name))


def test_card_states_base_licence_and_command(pair, tmp_path):
    (pair[0] / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    compress(
        *pair,
        tmp_path / "math.safetensors",
        options(),
        command="deltaweave compress --base a --tuned b",
    )
    card = (tmp_path / "math.md").read_text()
    assert "deltaweave compress --base a --tuned b" in card
    assert "licence apache-2.0" in card


def test_two_runs_are_byte_for_byte_equal(pair, tmp_path, text):
    one = compress(*pair, tmp_path / "one.safetensors", options(calibration=text))
    two = compress(*pair, tmp_path / "two.safetensors", options(calibration=text))
    assert digest(one) == digest(two)


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("stop_after", [1, 3, 5, 7, 9])
def test_an_interrupted_run_resumes_to_the_same_bytes(pair, tmp_path, text, monkeypatch, calibrated, stop_after):
    wanted = options(calibration=text if calibrated else "none")
    whole = compress(*pair, tmp_path / "whole.safetensors", wanted)
    original, calls = layers_module.compress_stage, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == stop_after:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(layers_module, "compress_stage", interrupted)
    broken = tmp_path / "broken.safetensors"
    try:
        compress(*pair, broken, wanted)
    except Killed:
        assert not broken.exists()
    done = len(calls)
    monkeypatch.setattr(layers_module, "compress_stage", lambda *a: calls.append(a) or original(*a))
    compress(*pair, broken, wanted, force=True)
    assert digest(broken) == digest(whole)
    assert not (tmp_path / "broken.safetensors.partial").exists()
    assert len(calls) - done <= 8 - 4 * ((stop_after - 1) // 4) + (8 if stop_after == 9 else 0)


def test_a_run_resumes_where_activations_were_saved_last(tmp_path, text, monkeypatch):
    """On a GPU not every layer's input is saved: later parts are made again, to the same bytes."""
    base = tiny_checkpoint(tmp_path / "base", layers=4)
    pair = base, perturbed(base, tmp_path / "tuned")
    wanted = options(calibration=text)
    whole = compress(*pair, tmp_path / "whole.safetensors", wanted)
    original, calls = layers_module.compress_stage, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 15:  # in layer 3
            raise Killed
        return original(*arguments)

    clock = iter([0.0, 1.0, 20.0, 21.0, 22.0])  # started; layer 0 done; layer 1 done, and saved; layer 2 done
    monkeypatch.setattr(layers_module, "monotonic", lambda: next(clock))
    monkeypatch.setattr(layers_module, "SECONDS_BETWEEN_SAVES", {"cpu": 20.0})
    monkeypatch.setattr(layers_module, "compress_stage", interrupted)
    broken = tmp_path / "broken.safetensors"
    with pytest.raises(Killed):
        compress(*pair, broken, wanted)
    unfinished = sorted(file.name for file in (tmp_path / "broken.safetensors.partial").iterdir())
    assert [name for name in unfinished if name.startswith("activations")] == [
        "activations-00002.bin",
        "activations-00003.tmp",
        "activations-00004.tmp",
    ]
    monkeypatch.setattr(layers_module, "monotonic", lambda: 0.0)
    calls.clear()
    monkeypatch.setattr(layers_module, "compress_stage", lambda *a: calls.append(a) or original(*a))
    compress(*pair, broken, wanted)
    assert len(calls) == 8
    assert digest(broken) == digest(whole)


@pytest.mark.parametrize(("stop_after", "drift"), [(7, False), (6, True), (7, True), (11, True)])
def test_activations_changed_in_place_change_no_byte(tmp_path, text, monkeypatch, drift, stop_after):
    """As on a GPU: a layer's input is overwritten while it may still be being saved; a stopped run finds it whole."""
    base = tiny_checkpoint(tmp_path / "base", layers=3)
    pair = base, perturbed(base, tmp_path / "tuned")
    recipe = Recipe(bands="8:1,3:4,2:*", ratio=3 / 4, group_size=32, correct_target=drift, correct_drift=drift)
    wanted = CompressionOptions(recipe, text, samples=8, sequence_length=32, device="cpu")
    in_files = compress(*pair, tmp_path / "files.safetensors", wanted)
    save, original, calls = calibration_module.Activations.save, layers_module.compress_stage, []

    def slow(activations):
        sleep(0.3)
        save(activations)

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == stop_after:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(calibration_module, "_fits", lambda *_: True)
    monkeypatch.setattr(calibration_module.Activations, "save", slow)
    monkeypatch.setattr(compress_module.Overlap, "beside", lambda _: Overlap(lambda: None))
    in_place = tmp_path / "place.safetensors"
    monkeypatch.setattr(layers_module, "compress_stage", interrupted)
    with pytest.raises(Killed):
        compress(*pair, in_place, wanted)
    if stop_after != 6:  # then it may still be being saved
        assert (tmp_path / f"place.safetensors.partial/activations-{(stop_after - 1) // 4:05}.bin").is_file()
    monkeypatch.setattr(layers_module, "compress_stage", original)
    assert digest(compress(*pair, in_place, wanted)) == digest(in_files)


def test_threads_beside_the_work_change_no_byte(pair, tmp_path, text, monkeypatch):
    """A GPU's run reads ahead and writes behind; here the same threads, without the GPU."""
    wanted = options(calibration=text)
    alone = compress(*pair, tmp_path / "alone.safetensors", wanted)
    monkeypatch.setattr(compress_module.Overlap, "beside", lambda _: Overlap(lambda: None))
    assert digest(compress(*pair, tmp_path / "threads.safetensors", wanted)) == digest(alone)
    rewrite(pair[1], lambda tensors: tensors[NAME].view(-1)[3:5].fill_(float("nan")))
    for calibration in (text, "none"):
        with pytest.raises(CheckpointError, match=f"{NAME} has 2 NaN or infinite values"):
            compress(*pair, tmp_path / "bad.safetensors", options(calibration=calibration), restart=True)


@pytest.mark.parametrize("most", [2, 5])
def test_two_are_made_ahead_at_once_and_come_in_order(most):
    together = Barrier(2, timeout=10)

    def made(item):
        together.wait()
        sleep(0.05 * (item % 2 == 0))  # the first of two is the slower
        return item

    with Overlap(lambda: None) as overlap:
        assert list(overlap.ahead(made, range(6), most)) == list(range(6))


def test_a_failed_write_behind_the_work_is_raised(pair, tmp_path, monkeypatch):
    def full(*_):
        raise OutputError("layer-00000: cannot be written (No space left on device)")

    monkeypatch.setattr(compress_module.Overlap, "beside", lambda _: Overlap(lambda: None))
    monkeypatch.setattr(compress_module.Workspace, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        compress(*pair, tmp_path / "d.safetensors", options())


def test_changed_options_are_refused_until_restarted(pair, tmp_path, monkeypatch):
    out = tmp_path / "d.safetensors"
    original = compress_module.package
    monkeypatch.setattr(compress_module, "package", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        compress(*pair, out, options())
    monkeypatch.setattr(compress_module, "package", original)
    with pytest.raises(ResumeError, match=r"unfinished work with other options \(recipe\)"):
        compress(*pair, out, options(bands="3:*"))
    compress(*pair, out, options(bands="3:*"), restart=True)


def test_changed_calibration_text_is_refused(pair, tmp_path, text, monkeypatch):
    out = tmp_path / "d.safetensors"
    monkeypatch.setattr(compress_module, "package", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        compress(*pair, out, options(calibration=text))
    Path(text).write_text("another text, as long as the first one was, and about other things. " * 50)
    with pytest.raises(ResumeError, match=r"with other options \(calibration_text\)"):
        compress(*pair, out, options(calibration=text))


def test_existing_output_is_kept(pair, tmp_path):
    out = tmp_path / "d.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        compress(*pair, out, options())
    assert out.read_bytes() == b"precious"
    compress(*pair, out, options(), force=True)
    assert Delta.open(out).names


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "model.embed_tokens.weight"])
def test_values_that_are_not_finite_are_named(pair, tmp_path, bad, name):
    rewrite(pair[1], lambda tensors: tensors[name].view(-1)[3:5].fill_(bad))
    with pytest.raises(CheckpointError, match=f"{name} has 2 NaN or infinite values"):
        compress(*pair, tmp_path / "d.safetensors", options())
    assert not (tmp_path / "d.safetensors").exists()


def test_mismatched_shapes_are_named(pair, tmp_path):
    rewrite(pair[0], lambda tensors: tensors.update({NAME: tensors[NAME][:-16].clone()}))
    with pytest.raises(CheckpointError, match=rf"{NAME}: .*base has shape .*tuned has"):
        compress(*pair, tmp_path / "d.safetensors", options())


def test_missing_projection_is_named(pair, tmp_path):
    rewrite(pair[1], lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=f"projections not found: {NAME}"):
        compress(*pair, tmp_path / "d.safetensors", options())


def test_other_architectures_are_refused_by_projection(pair, tmp_path):
    config = pair[1] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    rewrite(pair[1], lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(
        CheckpointError,
        match=r"'gpt2' is not supported .*not found: model.layers.0.self_attn.q_proj.weight",
    ):
        compress(*pair, tmp_path / "d.safetensors", options())


def test_missing_shard_is_named(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", sharded=True)
    tuned = perturbed(base, tmp_path / "tuned")
    shard = sorted(tuned.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        compress(base, tuned, tmp_path / "d.safetensors", options())


def test_truncated_weights_are_named(pair, tmp_path):
    file = pair[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable safetensors file"):
        compress(*pair, tmp_path / "d.safetensors", options())


def test_ratio_too_small(pair, tmp_path):
    with pytest.raises(RecipeError, match=r"ratio 0\.0001: q_proj"):
        compress(*pair, tmp_path / "d.safetensors", options(ratio=1e-4))


def test_wrong_base_is_refused_and_can_be_accepted(pair, tmp_path):
    out = compress(*pair, tmp_path / "d.safetensors", options())
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="is not the base that"):
        apply(other, out, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    apply(other, out, tmp_path / "dense", accept_base=True)


def test_apply_keeps_an_existing_folder(pair, tmp_path):
    out = compress(*pair, tmp_path / "d.safetensors", options())
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        apply(pair[0], out, tmp_path / "dense")
    assert (tmp_path / "dense" / "mine").exists()
    apply(pair[0], out, tmp_path / "dense", force=True)
    assert not (tmp_path / "dense" / "mine").exists()


def test_embeddings_left_at_the_base(pair, tmp_path):
    kept = options(policies=Policies(embeddings="base", lm_head="base"))
    out = compress(*pair, tmp_path / "d.safetensors", kept)
    base = Checkpoint.open(pair[0])
    with Delta.open(out) as delta:
        assert torch.equal(
            tuned_tensor(base, delta, "model.embed_tokens.weight"),
            base.tensor("model.embed_tokens.weight"),
        )
