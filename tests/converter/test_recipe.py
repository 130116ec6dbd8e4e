# SPDX-License-Identifier: Apache-2.0
"""Band lists, ratios and recipes."""

import pytest
from deltaweave.converter.errors import RecipeError
from deltaweave.converter.recipe import PRESETS, Recipe, parse_bands
from deltaweave.formats import Band, factored_bytes, published_alpha
from hypothesis import given, settings
from hypothesis import strategies as st


def triple(**options):
    return Recipe.preset("triple", **options)


def test_published_ranks_have_the_published_alpha_and_code_bytes():
    bands = (Band(8, 2), Band(3, 32), Band(2, 968))
    assert published_alpha((4096, 4096), bands) == 1 / 16
    assert factored_bytes((4096, 4096), bands, 128).codes == 2_097_152


def test_metadata_is_inside_the_ratio():
    plan = triple().plan("q_proj", (4096, 4096))
    assert [band.rank for band in plan.bands[:2]] == [2, 32]
    stored = factored_bytes((4096, 4096), plan.bands, 128).total
    assert 0.999 * 4096 * 4096 / 8 < stored <= 4096 * 4096 / 8
    assert published_alpha((4096, 4096), plan.bands) < 1 / 16


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*(p["bands"] for p in PRESETS.values() if p["bands"] != "auto"), "16:1,8:4,4:8,3:*", "1:*"]),
    st.integers(16, 3000),
    st.integers(16, 3000),
    st.sampled_from([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
)
def test_the_ratio_is_met_and_used(bands, out_features, in_features, ratio):
    shape, recipe = (out_features, in_features), Recipe(bands=bands, ratio=ratio)
    budget = ratio * 2 * out_features * in_features
    try:
        plan = recipe.plan("q_proj", shape)
    except RecipeError:
        last = parse_bands(bands)[-1].bits
        band = Band(last, 1, "none" if last == 16 else "affine")
        assert factored_bytes(shape, (band,), 128).total > budget
        return
    assert factored_bytes(shape, plan.bands, 128).total <= budget
    assert plan.rank <= min(shape)
    last = plan.bands[-1]
    if plan.rank < min(shape) and not plan.shrunk and last.bits == parse_bands(bands)[-1].bits:
        grown = (*plan.bands[:-1], Band(last.bits, last.rank + 1, last.grid))
        assert factored_bytes(shape, grown, 128).total > budget


def test_fixed_bands_shrink_in_proportion_when_the_matrix_is_small():
    plan = Recipe(bands="8:8,3:32,2:*", ratio=1 / 32).plan("k_proj", (192, 576))
    assert plan.shrunk
    ranks = {band.bits: band.rank for band in plan.bands}
    assert ranks[3] / ranks[8] == pytest.approx(4, rel=0.5)


def test_full_and_fixed_bands_ignore_the_ratio():
    assert Recipe(bands="16:full").plan("q_proj", (64, 96)).bands == (Band(16, 64, "none"),)
    assert Recipe(bands="8:2,3:32", ratio=1 / 64).plan("q_proj", (64, 96)).rank == 34


def test_fixed_bands_stop_at_the_matrix_rank():
    plan = Recipe(bands="8:2,3:500").plan("q_proj", (64, 96))
    assert [(band.bits, band.rank) for band in plan.bands] == [(8, 2), (3, 62)]


def test_ratio_too_small_names_everything():
    with pytest.raises(
        RecipeError,
        match=r"ratio 0.001: k_proj of shape \[16, 16\] has a budget of 0 bytes, and rank 1 at 2 bits",
    ):
        triple(ratio=0.001).plan("k_proj", (16, 16))


def test_overrides_by_kind():
    recipe = triple(overrides={"k_proj": "4:*"})
    assert {band.bits for band in recipe.plan("k_proj", (256, 256)).bands} == {4}
    assert 2 in {band.bits for band in recipe.plan("q_proj", (256, 256)).bands}


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ("", "'' is not BITS:RANK"),
        ("8-2", "'8-2' is not BITS:RANK"),
        ("5:2", "5 bits, expected one of 1, 2, 3, 4, 8, 16"),
        ("8:0", "rank 0"),
        ("8:*,2:*", "last band only"),
        ("8:full,2:*", "last band only"),
        (",".join(["2:1"] * 9), "9 bands, expected at most 8"),
    ],
)
def test_bad_bands(bands, message):
    with pytest.raises(RecipeError, match=message):
        parse_bands(bands)


def test_yaml(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("bands: 8:4,4:*\nratio: 0.125\noverrides:\n  k_proj: '4:*'\n")
    recipe = Recipe.from_yaml(file, damping=0.02)
    assert (recipe.name, recipe.ratio, recipe.damping, recipe.overrides) == (
        "mine",
        0.125,
        0.02,
        {"k_proj": "4:*"},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bands: '8:x'", "bands: bands '8:x'"),
        ("bands: '2:*'\nratios: 3", "ratios: Extra inputs are not permitted"),
        ("bands: '2:*'\nratio: 2", "ratio: Input should be less than or equal to 1"),
        ("- 8", "holds list"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_yaml(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_preset_lists_the_known():
    with pytest.raises(RecipeError, match="expected one of optimal, corrected, triple, double, single, low-rank"):
        Recipe.preset("quadruple")
