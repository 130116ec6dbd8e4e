# SPDX-License-Identifier: Apache-2.0
"""The recipe `optimal` from a pair to a file, and each of its switches against what it promises."""

import pytest
import torch
from deltaweave.converter import CompressionOptions, Recipe, RecipeError, compress, plan_compression, verify
from deltaweave.converter.projection import compress_stage
from deltaweave.converter.quantize import round_to_nearest
from deltaweave.converter.svd import truncated_svd, whitened_svd
from deltaweave.formats import Delta
from helpers import perturbed, tiny_checkpoint

RATIO = 1 / 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", hidden=128)
    return base, perturbed(base, folder / "tuned")


def options(**changes):
    recipe = Recipe.preset("optimal", ratio=RATIO, **changes)
    return CompressionOptions(recipe, samples=8, sequence_length=64, device="cpu")


def factored(delta):
    return {name: delta.record(name) for name in delta.names if name.endswith("_proj.weight")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sensitivity": "balanced"},
        {"sensitivity": "output"},
        {"sensitivity": "weight"},
        {"whiten": True},
        {"grid": "squared-error"},
        {"correct_target": False, "correct_drift": False},
        {"correct_drift": False},
        {"unbiased": False},
        {"widths": (1, 4)},
    ],
)
def test_every_switch_keeps_to_the_budget_and_gives_a_whole_file(pair, tmp_path, changes):
    path = compress(*pair, tmp_path / "d.safetensors", options(**changes))
    assert all(check.passed for check in verify(path, *pair))
    with Delta.open(path) as delta:
        records = factored(delta)
        budget = RATIO * sum(2 * shape[0] * shape[1] for shape in (record.shape for record in records.values()))
        assert 0.85 * budget < delta.byte_count().projections <= budget
        widths = {band.band.bits for record in records.values() for band in record.v.bands}
        assert widths <= set(changes.get("widths", (2, 3, 4, 8)))
        assert delta.header.method["name"] == "optimal"


def test_without_data_errors_are_weighed_alike(pair, tmp_path):
    recipe = Recipe.preset("optimal", ratio=RATIO)
    path = compress(*pair, tmp_path / "d.safetensors", CompressionOptions(recipe, "none", device="cpu"))
    with Delta.open(path) as delta:
        assert delta.header.method["name"] == "round-to-nearest"
        assert "predicted_kl" not in delta.header.method


def test_a_run_stopped_after_measuring_ends_with_the_same_bytes(pair, tmp_path):
    whole = compress(*pair, tmp_path / "whole.safetensors", options())

    class StopError(Exception):
        pass

    def stop(what, done, _):
        if what == "compressing" and done > 1:
            raise StopError

    def never_again(what, *_):
        assert what != "measuring"

    path = tmp_path / "stopped.safetensors"
    with pytest.raises(StopError):
        compress(*pair, path, options(), progress=stop)
    assert not list((tmp_path / "stopped.safetensors.partial").glob("measured-*"))
    assert compress(*pair, path, options(), progress=never_again).read_bytes() == whole.read_bytes()


def test_an_impossible_budget_is_refused_before_anything_is_measured(pair):
    with pytest.raises(RecipeError, match="all projections together have a budget of"):
        plan_compression(*pair, Recipe.preset("optimal", ratio=1e-6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bands": "auto", "overrides": {"k_proj": "4:*"}}, "overrides have no place beside bands: auto"),
        ({"bands": "2:*", "correct_drift": True}, "correct_drift is a part of correct_target, which is off"),
        ({"bands": "auto", "widths": (2, 2)}, r"widths \[2, 2\], expected different ones of"),
        ({"bands": "auto", "widths": (5,)}, r"widths \[5\], expected different ones of"),
        ({"bands": "auto", "widths": ()}, r"widths \[\], expected different ones of"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.checked(fields, "mine.yaml")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fitted_grids_never_lose_to_min_max(bits):
    vectors = torch.randn(20, 200, generator=torch.Generator().manual_seed(bits))
    widths = torch.full((20,), bits)
    fitted = (round_to_nearest(vectors, widths, 64, "squared-error").values - vectors).square().sum()
    spanned = (round_to_nearest(vectors, widths, 64).values - vectors).square().sum()
    assert fitted <= spanned
    if bits == 2:
        assert fitted < 0.6 * spanned


def test_a_corrected_target_lowers_the_output_error(pair, tmp_path):
    errors = {}
    for correct in (False, True):
        path = compress(
            *pair,
            tmp_path / f"{correct}.safetensors",
            options(correct_target=correct, correct_drift=False, unbiased=False, sensitivity="weight", widths=(2,)),
        )
        with Delta.open(path) as delta:
            found = [record.quality["output_error"] for record in factored(delta).values()]
        errors[correct] = sum(found) / len(found)
    assert errors[True] < errors[False]


def test_unbiased_vectors_are_as_long_as_what_they_stand_for():
    """Along the delta nothing is lost, and so little across it that a random part of the model could not tell."""
    generator = torch.Generator().manual_seed(2)
    delta, x = torch.randn(96, 64, generator=generator), torch.randn(400, 64, generator=generator)
    along, errors = {}, {}
    for unbiased in (False, True):
        recipe = Recipe(bands="1:full", unbiased=unbiased, group_size=32)
        (result,) = compress_stage(
            [delta], [truncated_svd(delta, 64)], [recipe.plan("", (96, 64))], x.T @ x / len(x), recipe
        )
        along[unbiased] = float((result.delta * delta).sum() / delta.square().sum())
        errors[unbiased] = float((result.delta - delta).square().sum() / delta.square().sum())
        u, v = result.record.u.dequantize(), result.record.v.dequantize()
        torch.testing.assert_close(result.delta, torch.tensor(u.T @ (result.record.sigma[:, None] * v)))
    assert along[False] < 0.8
    assert along[False] + 0.05 < along[True] < 1.05
    assert errors[True] < 2 * errors[False]


def test_whitened_vectors_hold_more_of_the_output_than_plain_ones():
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(24, 32, generator=generator)
    x = torch.randn(500, 32, generator=generator) * torch.logspace(0, 1.5, 32)
    moment = x.T @ x / len(x)

    def lost(factors):
        error = delta - factors.u @ (factors.sigma[:, None] * factors.v)
        return float(torch.trace(error @ moment @ error.T))

    assert lost(whitened_svd(delta, moment, 6)) < 0.7 * lost(truncated_svd(delta, 6))
    assert lost(whitened_svd(delta, moment, 24)) < 1e-4 * lost(truncated_svd(delta, 6))
    torch.testing.assert_close(whitened_svd(delta, moment, 6).v.norm(dim=1), torch.ones(6))


def test_corrected_keeps_the_presets_bands(pair, tmp_path):
    found = {}
    for name in ("triple", "corrected"):
        recipe = Recipe.preset(name, ratio=RATIO)
        settings = CompressionOptions(recipe, samples=8, sequence_length=64, device="cpu")
        path = compress(*pair, tmp_path / f"{name}.safetensors", settings)
        with Delta.open(path) as delta:
            bands = {key: record.bands for key, record in factored(delta).items()}
            found[name] = delta.byte_count().projections, bands, [r.sigma.tolist() for r in factored(delta).values()]
    assert found["triple"][:2] == found["corrected"][:2]
    assert found["triple"][2] != found["corrected"][2]
