# SPDX-License-Identifier: Apache-2.0
"""`attach` against the dense fine-tune that `apply` writes."""

import pytest
import torch
from deltaweave.converter import (
    BitDeltaOptions,
    CompressionOptions,
    Policies,
    Recipe,
    apply,
    compress,
    compress_bitdelta,
)
from deltaweave.formats import Delta
from deltaweave.runtime_plugin.pytorch import AttachError, attach
from helpers import FAMILIES, perturbed, tiny_checkpoint
from transformers import AutoModelForCausalLM

QUICK = Recipe(bands="8:2,2:*", ratio=3 / 4, group_size=32)
TOKENS = torch.arange(3, 43).view(2, 20)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def check(base, delta_path, tmp_path, tokens=TOKENS):
    """Attached logits equal those of the dense checkpoint, and detaching restores the base bit for bit."""
    apply(base, delta_path, tmp_path / "dense")
    model, dense = load(base), load(tmp_path / "dense")
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with Delta.open(delta_path) as delta:
        attachment = attach(model, delta)
    expected, got = logits(dense, tokens), logits(model, tokens)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-4 * expected.norm()
    assert not torch.equal(logits(model), before)
    attachment.detach()
    attachment.detach()
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families(tmp_path, family, tied):
    base = tiny_checkpoint(tmp_path / "base", family, tied=tied, dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned")
    check(base, compress(base, tuned, tmp_path / "d.safetensors", CompressionOptions(QUICK, "none")), tmp_path)


@pytest.mark.parametrize("policy", ["8bit", "exact"])
@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens(tmp_path, tied, policy):
    base = tiny_checkpoint(tmp_path / "base", tied=tied, dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned", added_tokens=3)
    options = CompressionOptions(QUICK, "none", policies=Policies(policy, policy))
    rows = load(tuned).config.vocab_size
    check(
        base, compress(base, tuned, tmp_path / "d.safetensors", options), tmp_path, torch.arange(rows - 12, rows)[None]
    )


def test_bitdelta_records(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned")
    check(base, compress_bitdelta(base, tuned, tmp_path / "d.safetensors", BitDeltaOptions("none")), tmp_path)


def test_another_model_is_refused_and_left_as_it_was(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned")
    path = compress(base, tuned, tmp_path / "d.safetensors", CompressionOptions(QUICK, "none"))
    model = load(tiny_checkpoint(tmp_path / "other", hidden=128))
    before = logits(model)
    with Delta.open(path) as delta, pytest.raises(AttachError, match=r"the model has shape \[.*\], the delta \["):
        attach(model, delta)
    assert torch.equal(logits(model), before)


def test_fewer_layers_are_refused_by_name(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned")
    path = compress(base, tuned, tmp_path / "d.safetensors", CompressionOptions(QUICK, "none"))
    model = load(tiny_checkpoint(tmp_path / "short", layers=1))
    with Delta.open(path) as delta, pytest.raises(AttachError, match=r"the model has no module model\.layers\.1\."):
        attach(model, delta)


def test_works_as_a_context(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned")
    path = compress(base, tuned, tmp_path / "d.safetensors", CompressionOptions(QUICK, "none"))
    model = load(base)
    before = logits(model)
    with Delta.open(path) as delta, attach(model, delta):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
