# SPDX-License-Identifier: Apache-2.0
"""Fusions in an arena: a mixed batch gives each row what `attach(model, fusion)` alone gives it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from deltaweave.converter import BitDeltaOptions, compress_bitdelta
from deltaweave.formats import Delta, DeltaExpert, DeltaReference, FixedGate, LoraReference, fusion_digest, write_fusion
from deltaweave.runtime_plugin.library import ArenaFullError
from deltaweave.runtime_plugin.pytorch import Arena, ArenaError, AttachError, Decoder, Request, attach
from fusion_family import TOKENS, alone, filled, greedy, make
from fusions import make_fusion, make_gate, make_lora, single
from helpers import FAMILIES, perturbed

pytestmark = pytest.mark.usefixtures("native")
PROMPTS = [list(range(3, 3 + length)) for length in (5, 17, 9, 30, 2, 8, 11)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make(tmp_path_factory.mktemp("family"))


@torch.no_grad()
def mixed(family, attachment, tenants, tokens=TOKENS):
    with attachment.step(tenants):
        return family.model(tokens[: len(tenants)], use_cache=False).logits


def assert_alone(family, logits, tenants):
    for row, tenant in enumerate(tenants):
        expected = family.expected[tenant][row]
        error = (logits[row, :, : expected.shape[-1]] - expected).abs().max()
        assert error < 2e-3 * expected.abs().max(), tenant


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_is_computed_by_its_own(tmp_path, name):
    family = make(tmp_path, name)
    tenants = ["three", None, "joined", "one", "eight", "fixed", "two", "deltas"]
    with attach(family.model, filled(family)) as attachment:
        logits = mixed(family, attachment, tenants)
        assert_alone(family, logits, tenants)
        assert_alone(family, mixed(family, attachment, tenants[::-1]), tenants[::-1])
    base = family.expected[None]
    for row in (0, 2, 4, 5, 7):
        assert (logits[row, :, : base.shape[-1]] - base[row]).abs().max() > 0.05 * base.abs().max(), tenants[row]
    assert torch.equal(alone(family, None, TOKENS), base), "detaching leaves no hook behind"


def test_texts_are_those_written_alone(family):
    tenants = ["three", "one", "joined", None, "eight", "two", "deltas"]
    requests = [Request(prompt, tenant, 8) for prompt, tenant in zip(PROMPTS, tenants, strict=True)]
    with (
        attach(family.model, filled(family)) as attachment,
        Decoder(family.model, attachment, max_batch=4, max_length=64) as decoder,
    ):
        found = [completion.tokens for completion in decoder.run(requests)]
    assert found == [greedy(family, tenant, prompt, 8) for prompt, tenant in zip(PROMPTS, tenants, strict=True)]


def test_hot_swap(family):
    """A name that comes to mean another fusion, and one that is forgotten, between steps."""
    arena = filled(family, "three")
    with attach(family.model, arena) as attachment:
        before = mixed(family, attachment, ["three", None])
        free = arena.stats().free_bytes
        arena.remove("three")
        assert arena.fusion_work.gated is False
        assert_alone(family, mixed(family, attachment, [None, "one"]), [None, "one"])
        arena.add(family.fusions["joined"], "three")
        assert arena.fusion_work.delta_experts == (1,)
        after = mixed(family, attachment, ["three", None])
        assert (after[0] - before[0])[..., :50].abs().max() > 0.01
        assert torch.equal(after[1], before[1])
        arena.remove("three")
        arena.add(family.fusions["three"], "three")
        assert arena.stats().free_bytes == free, "a fusion's experts go with it"
        assert_alone(family, mixed(family, attachment, ["three", None]), ["three", None])


def test_eviction_takes_and_brings_the_experts_too(family):
    arena = filled(family, "joined", "three")
    with attach(family.model, arena) as attachment:
        slots = arena.stats().resident_slots
        arena.evict("joined")
        assert not arena.is_resident("joined")
        assert arena.stats().resident_slots == slots - 2
        tenants = ["three", "joined", "one"]
        assert_alone(family, mixed(family, attachment, tenants), tenants)
        assert arena.stats().resident_slots == slots


def test_few_slots(family):
    """Four slots for six tenants: what a step needs is brought, the least recently used go."""
    arena = filled(family, "three", "joined", "deltas", slots=4)
    with attach(family.model, arena) as attachment:
        for tenants in (["three", "one"], ["joined", "two"], ["deltas", None], ["joined", "three"]):
            assert_alone(family, mixed(family, attachment, tenants), tenants)
        with pytest.raises(ArenaFullError):
            mixed(family, attachment, ["joined", "deltas"])
        arena.pin("joined")
        with pytest.raises(ArenaError, match="is pinned"):
            arena.evict("joined")
        with pytest.raises(ArenaFullError):
            mixed(family, attachment, ["deltas"])
        arena.unpin("joined")
        assert_alone(family, mixed(family, attachment, ["deltas"]), ["deltas"])


def test_a_fusion_that_does_not_fit_is_no_tenant(family):
    arena = filled(family, "three")
    for name in list(family.deltas):
        arena.pin(name)
    arena.pin("three")
    small = Arena.for_model(family.model, capacity_bytes=1 << 16, slots=4)
    with pytest.raises(ArenaFullError, match="takes"):
        small.add(family.fusions["joined"], "joined")
    tight = filled(family, "three", slots=3)
    for name in tight.names:
        tight.pin(name)
    with pytest.raises(ArenaFullError):
        tight.add(family.fusions["joined"], "joined")
    assert "joined" not in tight
    assert tight.stats().resident_slots == 3


def test_files_and_references(family, tmp_path):
    """A file that names a LoRA's file and a delta beside it."""
    lora = make_lora(np.random.default_rng(3), 4, scale=0.2, name="lora")
    part = write_fusion(tmp_path / "lora.safetensors", single(lora, family.identity))
    delta = tmp_path / "one.safetensors"
    delta.write_bytes(family.deltas["one"].read_bytes())
    with Delta.open(delta) as opened:
        named = DeltaReference("one", delta.name, opened.header_sha256)
        whole = replace(
            make_fusion(base=family.identity, count=2), experts=(lora, DeltaExpert("one", Delta.open(delta)))
        )
    stored = replace(whole, experts=(LoraReference("lora", part.name, fusion_digest(part)), named))
    path = write_fusion(tmp_path / "mine.safetensors", stored)
    arena = Arena.for_model(family.model, capacity_bytes=16 << 20, slots=4)
    assert arena.add(path).name == "mine"
    with attach(family.model, arena) as attachment:
        logits = mixed(family, attachment, ["mine"])
    with attach(family.model, whole):
        expected = family.alone(None, TOKENS[:1])
    assert (logits[0, :, : expected.shape[-1]] - expected[0]).abs().max() < 2e-3 * expected.abs().max()
    with pytest.raises(AttachError, match="read it with resolve_fusion"):
        arena.add(stored, "other")


def test_what_is_refused(family, tmp_path):
    arena = Arena.for_model(family.model, capacity_bytes=16 << 20, slots=4)
    generator = np.random.default_rng(0)
    good = family.fusions["three"]

    def refused(match, **changes):
        with pytest.raises(AttachError, match=match):
            arena.add(replace(good, **changes), "bad")
        assert "bad" not in arena

    nine = tuple(make_lora(generator, 1, name=f"l{index}") for index in range(9))
    refused("9 experts, a runtime serves 1 to 8", experts=nine, gate=make_gate(generator, 9))
    refused("gates of 3 blocks, the model has 2", gate=make_gate(generator, 3, layers=3))
    refused("hidden_size 32, the model has 64", gate=make_gate(generator, 3, hidden=32))
    refused("the model is a llama", architecture=replace(good.architecture, model_type="qwen2"))
    other = make_fusion().base
    refused("not those of the base|no tensor of this name", base=other)
    wide = tuple(make_lora(generator, 180, name=f"l{index}") for index in range(3))
    refused("of rank 540 together", experts=wide)
    with pytest.raises(ArenaError, match="give it one"):
        arena.add(good)
    arena.add(good, "good")
    with pytest.raises(ArenaError, match="is there already"):
        arena.add(good, "good")

    tuned = perturbed(family.base, tmp_path / "tuned")
    dense = compress_bitdelta(family.base, tuned, tmp_path / "bit.safetensors", BitDeltaOptions())
    expert = DeltaExpert("bit", Delta.open(dense))
    refused("an expert of a fusion needs factored records", experts=(expert,), gate=FixedGate((1.0,)))
