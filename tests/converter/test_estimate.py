# SPDX-License-Identifier: Apache-2.0
"""The dry run: sizes are those of the file that follows, costs grow with what they are counted from."""

import importlib

import pytest
import torch
from deltaweave.converter import (
    CompressionOptions,
    Policies,
    Recipe,
    RecipeError,
    compress,
    estimate,
    plan_compression,
)
from deltaweave.formats import Delta
from helpers import FAMILIES, perturbed, tiny_checkpoint

# The package exports the function under the module's name.
estimate_module = importlib.import_module("deltaweave.converter.estimate")
RECIPES = {
    "free rank": Recipe(bands="8:1,3:4,2:*", ratio=3 / 4, group_size=32),
    "one bit": Recipe(bands="1:*", ratio=3 / 4, group_size=32),
    "fixed ranks": Recipe(bands="8:2,4:5", group_size=16),
    "shrunk": Recipe(bands="8:8,3:32,2:*", ratio=0.6, group_size=64),
    "full": Recipe(bands="16:full", ratio=1.0),
    "overrides": Recipe(bands="3:*", ratio=3 / 4, group_size=32, overrides={"k_proj": "8:3", "down_proj": "4:*"}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base")
    return base, perturbed(base, folder / "tuned", added_tokens=2)


@pytest.fixture
def one_rate(monkeypatch):
    """A device of 10^9 operations per second, so that seconds can be compared."""
    monkeypatch.setattr(estimate_module, "_rate", lambda *_: 1e9)


def costs(pair, recipe=RECIPES["free rank"], calibration="none", **more):
    return estimate(plan_compression(*pair, recipe), CompressionOptions(recipe, calibration, **more))


def sized(folder, **settings):
    base = tiny_checkpoint(folder / "base", **settings)
    return base, perturbed(base, folder / "tuned")


@pytest.mark.parametrize("name", RECIPES)
def test_projection_bytes_are_those_of_the_file(pair, tmp_path, name):
    foretold = costs(pair, RECIPES[name])
    with Delta.open(compress(*pair, tmp_path / "d.safetensors", CompressionOptions(RECIPES[name], "none"))) as delta:
        count = delta.byte_count()
    assert foretold.projection_bytes == count.projections
    # Of the rest, padding of each tensor to 256 bytes is left out.
    assert count.projections + count.other - 256 * 30 <= foretold.file_bytes <= count.projections + count.other


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(tmp_path, family):
    pair = sized(tmp_path, family=family, tied=family == "qwen3")
    recipe = RECIPES["free rank"]
    with Delta.open(compress(*pair, tmp_path / "d.safetensors", CompressionOptions(recipe, "none"))) as delta:
        assert costs(pair, recipe).projection_bytes == delta.byte_count().projections


@pytest.mark.parametrize("policy", ["exact", "8bit", "base"])
def test_embeddings_count_by_their_policy(pair, tmp_path, policy):
    options = CompressionOptions(RECIPES["free rank"], "none", policies=Policies(policy, policy))
    foretold = estimate(plan_compression(*pair, options.recipe), options)
    with Delta.open(compress(*pair, tmp_path / "d.safetensors", options)) as delta:
        other = delta.byte_count().other
    assert other - 256 * 30 <= foretold.file_bytes - foretold.projection_bytes <= other


def test_time_is_measured_on_this_machine(pair):
    assert 0 < costs(pair).seconds < 60
    assert estimate_module._rate(torch.float32, torch.device("cpu")) > 1e8


def test_time_grows_with_the_work(pair, tmp_path, one_rate):
    quick = costs(pair).seconds
    short = costs(pair, calibration="default", samples=16, sequence_length=32).seconds
    long = costs(pair, calibration="default", samples=64, sequence_length=32).seconds
    assert 0 < quick < short < long
    deeper = sized(tmp_path / "deep", layers=4)
    assert costs(deeper).seconds == pytest.approx(2 * quick)
    assert costs(sized(tmp_path / "wide", hidden=128)).seconds > 4 * quick


@pytest.mark.parametrize("calibration", ["none", "default"])
def test_memory_grows_with_width_and_not_with_depth(pair, tmp_path, calibration):
    settings = {"calibration": calibration, "samples": 4, "sequence_length": 32}
    narrow = costs(pair, **settings).memory_bytes
    wide = costs(sized(tmp_path / "wide", hidden=128), **settings).memory_bytes
    wider = costs(sized(tmp_path / "wider", hidden=256), **settings).memory_bytes
    assert estimate_module.IDLE_BYTES < narrow < wide < wider
    assert costs(sized(tmp_path / "deep", layers=4), **settings).memory_bytes == narrow


def test_activations_are_disk_and_not_memory(pair):
    few, many = (costs(pair, calibration="default", samples=count, sequence_length=64) for count in (8, 800))
    assert few.memory_bytes == many.memory_bytes
    # Two files of hidden states, bfloat16 or float32 as the device computes.
    grown = many.disk_bytes - few.disk_bytes
    assert grown in {2 * 792 * 64 * 64 * size for size in (2, 4)}


def test_drift_costs_another_walk(pair, one_rate):
    fields = {"bands": "8:1,3:4,2:*", "ratio": 3 / 4, "group_size": 32, "correct_target": True}
    settings = {"calibration": "default", "samples": 800, "sequence_length": 64}
    plain, drifting = (costs(pair, Recipe(**fields, correct_drift=drift), **settings) for drift in (False, True))
    assert 1.5 * plain.seconds < drifting.seconds < 3 * plain.seconds
    kept = 800 * 64 * 64  # twice in the device's dtype, and thrice in float32
    assert drifting.disk_bytes - plain.disk_bytes in {kept * (3 * 4 - 2 * size) for size in (2, 4)}
    assert drifting.memory_bytes > plain.memory_bytes


def test_disk_holds_unfinished_work_and_the_output(pair, tmp_path, monkeypatch):
    """Against what lies there when unfinished work is about to be removed: headers and carried files are left out."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    settings = {"calibration": str(tmp_path / "text.txt"), "samples": 64, "sequence_length": 32}
    foretold = costs(pair, **settings).disk_bytes
    seen = []

    def measure(workspace):
        files = [*workspace.folder.iterdir(), tmp_path / "d.safetensors"]
        seen.append(sum(file.stat().st_size for file in files))

    monkeypatch.setattr("deltaweave.converter.workspace.Workspace.remove", measure)
    out = compress(*pair, tmp_path / "d.safetensors", CompressionOptions(RECIPES["free rank"], **settings))
    with Delta.open(out) as delta:
        count = delta.byte_count()
    # The unfinished work's headers say much the same as the output's, and its base.json the same as the base's part.
    left_out = 3 * count.header + count.carried
    assert foretold <= seen[0] <= foretold + left_out


def test_impossible_ratio_is_told_before_any_work(pair):
    with pytest.raises(RecipeError, match="rank 1"):
        costs(pair, Recipe(bands="2:*", ratio=1e-4))


def test_writes_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in pair[0].parent.rglob("*")}
    costs(pair, calibration="default")
    assert {file: file.stat().st_mtime_ns for file in pair[0].parent.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []
