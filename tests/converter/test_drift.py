# SPDX-License-Identifier: Apache-2.0
"""Drift behind compressed layers: its moments against whole models, its correction against least squares."""

import pytest
import torch
from deltaweave.converter import Checkpoint, CompressionOptions, Recipe, compress, tuned_names, tuned_tensor
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.drift import OwnStream, stage_moments
from deltaweave.converter.families import family_of
from deltaweave.converter.projection import compress_stage
from deltaweave.converter.svd import truncated_svd
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import Delta
from helpers import FAMILIES, perturbed, tiny_checkpoint
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
SAMPLES, LENGTH = 3, 20


def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def activations(stream, path, tokens):
    hidden = Activations.create(path, (*tokens.shape, 64), torch.float32, CPU)
    stream.embed(tokens, hidden)
    return hidden


@pytest.mark.parametrize("half_products", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_two_whole_models(tmp_path, family, half_products):
    """The model of the first block's attention strayed; every stage of the block sees it in its input or its stream."""
    folder = tiny_checkpoint(tmp_path / "model", family, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    tokens = torch.randint(4, 40, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    served, own_stream = (
        BlockStream(checkpoint, LENGTH, CPU, torch.float32, half_products=half_products) for _ in range(2)
    )
    inputs = activations(served, tmp_path / "a.bin", tokens)
    own = OwnStream(own_stream, activations(own_stream, tmp_path / "b.bin", tokens))
    own_stream.load(0)
    strayed, exact, seen = model(folder), model(folder), {}
    for whole in (strayed.model.layers[0], served.load(0)):
        generator = torch.Generator().manual_seed(1)
        for name in ("q_proj", "v_proj", "o_proj"):
            weight = whole.self_attn.get_submodule(name).weight
            strayed_by = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data = (weight.data.float() + strayed_by).to(weight.dtype)
    for key, whole in (("served", strayed), ("own", exact)):
        for name, module in whole.model.layers[0].named_modules():
            module.register_forward_pre_hook(
                lambda _, x, name=name, key=key: seen.__setitem__((key, name), x[0].detach()) if x else None
            )
        with torch.no_grad():
            whole(tokens, use_cache=False)

    def assert_close(found, wanted):
        if half_products:
            assert (found.double() - wanted).norm() <= 3e-3 * wanted.norm()
        else:
            torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)

    for stage in family_of(checkpoint).projections(checkpoint)[0]:
        first = stage[0]
        told = []
        moments = stage_moments(served, own, first, inputs, told.append)

        def product(name, x):
            parts = [seen[key, name].flatten(0, -2).double() for key in ("own", "served")]
            return 2 / SAMPLES * (parts[0] - parts[1]).T @ x

        x = seen["served", first.module].flatten(0, -2).double()
        expected = 2 / SAMPLES * x.T @ x, product(first.module, x)
        for found, wanted in zip((moments.inputs, moments.strayed), expected, strict=True):
            assert_close(found, wanted)
        assert told == [1]
        adds = first.module in ("self_attn.o_proj", "mlp.down_proj")
        assert (moments.residual is not None) == adds
        if adds:
            norm = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}[first.module]
            wanted = product(norm, x)
            assert_close(moments.residual, wanted)
            assert (float(wanted.abs().max()) > 0.01) == (first.module == "mlp.down_proj")
            for rows, hidden in inputs.chunks():
                inputs.write(rows, served.through_half(0, first.half, hidden))


def test_a_corrected_delta_is_the_least_squares_answer():
    """Kept in 16 bits at full rank, base + delta gives what the stream lacks as nearly as any matrix could."""
    generator = torch.Generator().manual_seed(3)
    base, delta = torch.randn(24, 16, generator=generator), 0.1 * torch.randn(24, 16, generator=generator)
    own = torch.randn(500, 16, generator=generator)
    x = own + 0.3 * torch.randn(500, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    stream = 0.2 * torch.randn(500, 24, generator=generator) + x @ torch.randn(16, 24, generator=generator)
    wanted = own @ (base + delta).T + stream - x @ base.T
    best = torch.linalg.lstsq(x.double(), wanted.double()).solution.T.float()

    recipe = Recipe(bands="16:full", correct_target=True, correct_drift=True, group_size=16)
    lacking = ((base + delta) @ (own - x).T + stream.T) @ x / len(x)
    (result,) = compress_stage(
        [delta], [truncated_svd(delta, 16)], [recipe.plan("", (24, 16))], x.T @ x / len(x), recipe, [lacking]
    )
    torch.testing.assert_close(result.delta, best, rtol=0.02, atol=0.02)


def test_what_early_layers_lose_later_ones_make_good(tmp_path):
    """Over six layers, on text that was not calibrated on: the last hidden state strays less, at the same bytes."""
    base = tiny_checkpoint(tmp_path / "base", layers=6, hidden=128, dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned", scale=0.1, embeddings=False)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    for file, numbers in ((text, range(2000)), (other, range(2000, 2500))):
        file.write_text(" ".join(f"the {n} brown foxes jump over {n * n} lazy dogs" for n in numbers))
    held_out = CalibrationData.load(other, tuned, 8, 64, 0).tokens
    exact, found = model(tuned), {}
    candidate = model(tuned)
    for drift in (False, True):
        recipe = Recipe(bands="2:*", ratio=1 / 4, correct_target=True, correct_drift=drift)
        options = CompressionOptions(recipe, str(text), samples=64, sequence_length=64, device="cpu")
        path = compress(base, tuned, tmp_path / f"{drift}.safetensors", options)
        checkpoint = Checkpoint.open(base)
        with Delta.open(path) as delta:
            state = {name: tuned_tensor(checkpoint, delta, name) for name in tuned_names(checkpoint, delta)}
            size = delta.byte_count().projections
        candidate.load_state_dict(state, strict=False)
        with torch.no_grad():
            wanted, given = (whole.model(held_out, use_cache=False).last_hidden_state for whole in (exact, candidate))
        found[drift] = float((wanted - given).square().sum() / wanted.square().sum()), size
    assert found[True][1] == found[False][1]
    assert found[True][0] < 0.9 * found[False][0]
