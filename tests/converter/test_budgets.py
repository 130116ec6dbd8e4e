# SPDX-License-Identifier: Apache-2.0
"""Budgets by ratio, bytes and quality, from a pair to a file; KL is measured again by another program."""

import importlib
import itertools
import json
import random

import pytest
import torch
from deltaweave.converter import (
    CalibrationError,
    Checkpoint,
    CheckpointError,
    CompressionOptions,
    Recipe,
    RecipeError,
    compress,
    estimate,
    plan_compression,
    verify,
)
from deltaweave.converter.fidelity import Fidelity
from deltaweave.converter.recipe import parse_bytes
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import Delta
from helpers import perturbed, tiny_checkpoint

from deltaweave.evaluation.text import score_text
from deltaweave.models import load_checkpoint, load_tuned

SAMPLES, LENGTH = 8, 32


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", hidden=128)
    return base, perturbed(base, folder / "tuned")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox, 0123456789; jumps over the lazy dog? yes! (12 + 7) * 3 = 57.\n" * 60)
    return str(file)


def options(text, recipe="optimal", **budget):
    return CompressionOptions(Recipe.preset(recipe, **budget), text, SAMPLES, LENGTH, device="cpu")


def held_out_tokens(pair, text):
    return CalibrationData.split(text, pair[1], SAMPLES, LENGTH, 0)[1].tokens


def measured_elsewhere(pair, path, tokens):
    """By whole models of Transformers in memory."""
    with Delta.open(path) as delta:
        return score_text(load_checkpoint(pair[1]), load_tuned(Checkpoint.open(pair[0]), delta), tokens).kl


def dense_bytes(pair):
    return plan_compression(*pair, Recipe.preset("optimal")).dense_bytes


@pytest.mark.parametrize("recipe", ["optimal", "triple"])
def test_bytes_are_a_ratio_by_another_name(pair, text, tmp_path, recipe):
    wanted = 180_000
    path = compress(*pair, tmp_path / "d.safetensors", options(text, recipe, max_bytes=wanted))
    with Delta.open(path) as delta:
        assert 0.9 * wanted < delta.byte_count().projections <= wanted
        records = {name: delta.record(name) for name in delta.names}
        assert delta.header.method["recipe"]["max_bytes"] == wanted
    same = compress(*pair, tmp_path / "r.safetensors", options(text, recipe, ratio=wanted / dense_bytes(pair)))
    with Delta.open(same) as delta:
        for name, record in records.items():
            assert record.shape == delta.record(name).shape
            assert torch.equal(*(torch.from_numpy(d.apply_to(name, None)) for d in (Delta.open(path), delta)))


@pytest.mark.parametrize(("recipe", "limit"), [("optimal", 0.02), ("triple", 0.1)])
def test_the_smallest_file_within_a_measured_kl(pair, text, tmp_path, recipe, limit):
    heard = []
    wanted = options(text, recipe, max_kl=limit)
    path = compress(*pair, tmp_path / "d.safetensors", wanted, progress=lambda *said: heard.append(said))
    assert all(check.passed for check in verify(path, *pair))
    with Delta.open(path) as delta:
        quality, method = delta.header.method["quality"], delta.header.method
        chosen = quality["chosen"]
        assert chosen["bytes"] == delta.byte_count().projections
        assert method["recipe"]["max_kl"] == limit
        assert method["recipe"]["ratio"] == chosen["ratio"]
    assert f"KL to the fine-tune {chosen['kl']:.3g} +-" in path.with_suffix(".md").read_text()
    elsewhere = measured_elsewhere(pair, path, held_out_tokens(pair, text))
    assert chosen["kl"] == pytest.approx(elsewhere, rel=1e-3)
    assert 0.6 * limit < elsewhere <= limit
    assert chosen == min((a for a in quality["attempts"] if a["kl"] <= limit), key=lambda a: a["bytes"])
    assert {f"try 1, 1/{1 / quality['attempts'][0]['ratio']:.1f}: compressing", "measuring KL"} <= {s[0] for s in heard}
    assert not list(tmp_path.glob("*.partial"))


def test_held_out_text_is_not_calibrated_on(pair, text):
    whole = CalibrationData.load(text, pair[1], 1, LENGTH, 0)
    calibration, held_out = CalibrationData.split(text, pair[1], 500, LENGTH, 0)
    assert (whole.sha256, whole.source) == (held_out.sha256, held_out.source)
    assert calibration.tokens.shape == (500, LENGTH)
    assert held_out.tokens.shape[1] == LENGTH


def test_held_out_pieces_and_the_rest_make_the_text(pair, tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    file = tmp_path / "unlike.txt"
    file.write_text("".join(random.Random(0).choices(letters, k=3200)))
    _, held_out = CalibrationData.split(str(file), pair[1], 1, LENGTH, 0)
    assert len(held_out.tokens) == 12  # an eighth of 100 pieces
    every = CalibrationData.held_out(str(file), pair[1], LENGTH).tokens
    assert len(every) == 100
    places = [int((every == piece).all(1).nonzero()[0]) for piece in held_out.tokens]
    assert {after - before for before, after in itertools.pairwise(places)} <= {8, 9}
    calibration, _ = CalibrationData.split(str(file), pair[1], 400, 8, 0)
    assert calibration.tokens.shape == (400, 8)


def test_a_text_of_its_own_is_measured_on(pair, text, tmp_path):
    other = tmp_path / "held-out.txt"
    other.write_text("zebras (and 99 yaks) graze; why not? " * 40)
    wanted = CompressionOptions(
        Recipe.preset("triple", max_kl=0.1), "none", SAMPLES, LENGTH, device="cpu", held_out=str(other)
    )
    path = compress(*pair, tmp_path / "d.safetensors", wanted)
    with Delta.open(path) as delta:
        quality = delta.header.method["quality"]
    assert quality["text"] == "held-out.txt"
    tokens = CalibrationData.held_out(str(other), pair[1], LENGTH).tokens
    assert quality["tokens"] == tokens.numel()
    assert quality["chosen"]["kl"] == pytest.approx(measured_elsewhere(pair, path, tokens), rel=1e-3)


@pytest.mark.parametrize("stopped_at", ["measuring the", "try 1", "try 2", "last"])
def test_a_stopped_search_ends_with_the_same_bytes(pair, text, tmp_path, stopped_at):
    wanted = options(text, max_kl=0.02)
    told = []
    whole = compress(*pair, tmp_path / "whole.safetensors", wanted, progress=lambda *said: told.append(said[0]))
    stop = {"measuring the": 3, "last": len(told) - 1}.get(stopped_at)
    if stop is None:
        stop = 3 + next(index for index, what in enumerate(told) if what.startswith(stopped_at))

    class StopError(Exception):
        pass

    def stopping(*_):
        nonlocal stop
        stop -= 1
        if stop < 0:
            raise StopError

    path = tmp_path / "stopped.safetensors"
    with pytest.raises(StopError):
        compress(*pair, path, wanted, progress=stopping)
    retold = []
    compress(*pair, path, wanted, progress=lambda *said: retold.append(said[0]))
    assert path.read_bytes() == whole.read_bytes()
    assert len(retold) <= len(told)


def test_nothing_is_measured_or_decomposed_twice(pair, text, tmp_path, monkeypatch):
    calls = []
    module = importlib.import_module("deltaweave.converter.decompositions")
    original = module.short_vectors
    monkeypatch.setattr(module, "short_vectors", lambda *a: calls.append(a[0].shape) or original(*a))
    path = compress(*pair, tmp_path / "d.safetensors", options(text, max_kl=0.02))
    with Delta.open(path) as delta:
        assert len(delta.header.method["quality"]["attempts"]) > 1
    assert len(calls) == 14


def test_vectors_that_a_fall_of_the_system_left_empty_are_made_again(pair, text, tmp_path):
    whole = compress(*pair, tmp_path / "whole.safetensors", options(text, ratio=1 / 4))

    class StopError(Exception):
        pass

    def stop(what, done, _):
        if what == "compressing" and done > 0:
            raise StopError

    path = tmp_path / "stopped.safetensors"
    with pytest.raises(StopError):
        compress(*pair, path, options(text, ratio=1 / 4), progress=stop)
    kept = sorted((tmp_path / "stopped.safetensors.partial").glob("vectors-*.bin"))
    assert len(kept) == 14
    kept[0].write_bytes(bytes(kept[0].stat().st_size))
    kept[1].write_bytes(kept[1].read_bytes()[:100])
    kept[2].unlink()
    assert compress(*pair, path, options(text, ratio=1 / 4)).read_bytes() == whole.read_bytes()


def test_limits_that_cannot_be_kept_are_told(pair, text, tmp_path):
    with pytest.raises(RecipeError, match=r"max_kl 1e-12: not reached by the largest file either; the least was"):
        compress(*pair, tmp_path / "d.safetensors", options(text, "triple", max_kl=1e-12))
    with pytest.raises(RecipeError, match="the base's own projections have"):
        compress(*pair, tmp_path / "e.safetensors", options(text, "triple", max_kl=1e3))
    assert not list(tmp_path.glob("*.safetensors*"))


def test_bytes_beyond_the_projections_are_refused(pair):
    with pytest.raises(RecipeError, match=rf"max_bytes 1000000000: the projections take {dense_bytes(pair)} bytes"):
        plan_compression(*pair, Recipe.preset("optimal", max_bytes="1GB"))


@pytest.mark.parametrize("recipe", ["optimal", "triple"])
def test_bytes_that_no_rank_fits_are_named_as_they_were_given(pair, recipe):
    with pytest.raises(RecipeError, match=r"^max_bytes 1, ratio \S+: .* budget of \d bytes, and rank 1 at "):
        plan_compression(*pair, Recipe.preset(recipe, max_bytes=1))


def test_text_too_short_to_leave_anything_to_calibrate_on(pair, tmp_path):
    (tmp_path / "short.txt").write_text("a" * 40)
    with pytest.raises(CalibrationError, match=r"short\.txt: leaves 9 tokens beside the 32 to measure on"):
        compress(*pair, tmp_path / "d.safetensors", options(str(tmp_path / "short.txt"), max_kl=0.1))
    assert not list(tmp_path.glob("*.partial"))


def test_a_kl_that_is_no_number_is_refused(pair, text, tmp_path, monkeypatch):
    def broken(name, record):
        return torch.full(Checkpoint.open(pair[1]).shape(name), torch.inf)

    monkeypatch.setattr(Fidelity, "_served", lambda self, name, record: broken(name, record))
    with pytest.raises(CheckpointError, match="is no number: infinite or NaN logits"):
        compress(*pair, tmp_path / "d.safetensors", options(text, "triple", max_kl=0.1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.1, "max_kl": 0.1}, "ratio and max_kl are budgets of one thing"),
        ({"max_bytes": 10, "max_kl": 0.1}, "max_bytes and max_kl are budgets of one thing"),
        ({"bands": "16:full", "max_kl": 0.1}, "max_kl: bands '16:full' leave nothing to it"),
        ({"bands": "8:2,3:30", "max_bytes": 100}, "max_bytes: bands '8:2,3:30' leave nothing to it"),
        ({"max_kl": 0}, "max_kl: Input should be greater than 0"),
        ({"max_kl": float("inf")}, "max_kl: Input should be a finite number"),
        ({"max_bytes": "many"}, "max_bytes: 'many' is no size"),
        ({"max_bytes": 0}, "max_bytes: Input should be greater than 0"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.checked({"bands": "8:2,2:*", **fields}, "mine.yaml")


def test_a_held_out_text_without_a_quality_is_refused():
    with pytest.raises(RecipeError, match="is measured on only where the recipe has a max_kl"):
        CompressionOptions(held_out="mine.txt")


def test_a_budget_of_the_call_replaces_the_file_s(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("bands: auto\nmax_bytes: 1.5 MB\n")
    assert Recipe.from_yaml(file).max_bytes == 1_500_000
    recipe = Recipe.from_yaml(file, max_kl=0.1)
    assert (recipe.max_bytes, recipe.max_kl) == (None, 0.1)
    assert Recipe.from_yaml(file, damping=0.02).max_bytes == 1_500_000


@pytest.mark.parametrize(
    ("written", "count"),
    [("900MB", 900_000_000), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("7", 7), ("3k", 3000), ("2KiB", 2048)],
)
def test_sizes(written, count):
    assert parse_bytes(written) == count


@pytest.mark.parametrize("written", ["", "MB", "-3MB", "1.2.3GB", "5 apples", "3iB", "1e3"])
def test_bad_sizes(written):
    with pytest.raises(RecipeError, match="is no size"):
        parse_bytes(written)


def test_an_estimate_of_a_search_counts_its_tries(pair, text):
    costs = {}
    for name, budget in (("ratio", {"ratio": 1 / 8}), ("kl", {"max_kl": 0.1})):
        wanted = options(text, **budget)
        costs[name] = estimate(plan_compression(*pair, wanted.recipe), wanted)
    assert costs["ratio"].tries == 1 < costs["kl"].tries
    assert costs["kl"].seconds > costs["ratio"].seconds
    assert json.dumps(costs["kl"].tries)
