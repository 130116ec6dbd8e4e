# SPDX-License-Identifier: Apache-2.0
"""The block-by-block Fisher information against PyTorch's autograd through the whole model."""

import pytest
import torch
from deltaweave.converter import Checkpoint
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.families import family_of
from deltaweave.converter.sensitivity import layer_sensitivities
from helpers import FAMILIES, tiny_checkpoint
from transformers import AutoModelForCausalLM

SAMPLES, LENGTH, SEED = 3, 16, 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_against_the_whole_model(tmp_path, family, tied):
    folder = tiny_checkpoint(tmp_path / "model", family, tied=tied, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    tokens = torch.randint(0, checkpoint.shape("model.embed_tokens.weight")[0], (SAMPLES, LENGTH))
    layers = family_of(checkpoint).projections(checkpoint)
    cpu = torch.device("cpu")
    stream = BlockStream(checkpoint, LENGTH, cpu)
    shape = (SAMPLES, LENGTH, 64)
    activations = [Activations.create(tmp_path / f"{i}.bin", shape, torch.float32, cpu) for i in range(3)]
    stream.embed(tokens, activations[0])
    told = []
    measured = layer_sensitivities(stream, layers, activations, tokens.numel(), SEED, told.append)
    found = dict(measured)
    expected = whole_model_moments(folder, tokens)
    assert sorted(found) == [0, 1]
    assert told == sorted(told)
    assert told[-1] == 1
    for layer, stages in enumerate(layers):
        for projection in (projection for stage in stages for projection in stage):
            inputs, outputs = expected[projection.weight.removesuffix(".weight")]
            torch.testing.assert_close(found[layer].inputs[projection.weight], inputs, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found[layer].outputs[projection.weight], outputs, rtol=1e-3, atol=1e-8)


def whole_model_moments(folder, tokens):
    """E[x x^T] and E[g g^T] of every projection, by hooks on the model as Transformers runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):

            def watch(_, arguments, output, name=name):
                output.retain_grad()
                seen[name] = (arguments[0].detach(), output)

            module.register_forward_hook(watch)
    logits = model(tokens).logits.flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(SEED))[:, 0]
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    moments = {}
    for name, (x, output) in seen.items():
        x, g = x.flatten(0, 1), output.grad.flatten(0, 1)
        moments[name] = (x.T @ x / len(x), g.T @ g / len(g))
    return moments
