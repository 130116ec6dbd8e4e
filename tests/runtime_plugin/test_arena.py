# SPDX-License-Identifier: Apache-2.0
"""`Arena`: tenants come, go to host memory and come back; what does not fit or does not belong is refused."""

import numpy as np
import pytest
import torch
from deltaweave.converter import BitDeltaOptions, Checkpoint, CompressionOptions, Recipe, compress, compress_bitdelta
from deltaweave.formats import (
    Architecture,
    Band,
    Delta,
    ExactArray,
    Header,
    ReplaceRecord,
    RowsRecord,
    TunedInfo,
    write_delta,
)
from deltaweave.runtime_plugin.library import ArenaFullError, LibraryError
from deltaweave.runtime_plugin.pytorch import Arena, ArenaError, AttachError, attach, native
from deltaweave.runtime_plugin.pytorch.context_switch import QuietSwitch
from family import Family, edit_config, finetune, load
from helpers import perturbed, tiny_checkpoint
from op_arena import random_factored

pytestmark = pytest.mark.usefixtures("native")
TOKENS = torch.arange(3, 13)[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    family = Family.make(tmp_path_factory.mktemp("family"))
    for seed, name in enumerate(("a", "b", "c", "d")):
        family.add(name, seed=seed)
    return family


@pytest.fixture
def arena(family):
    return family.arena()


def residents(arena):
    return {name for name in arena.names if arena.is_resident(name)}


@torch.no_grad()
def serves(family, arena, names):
    """Whether each of some tenants computes what it computes alone, one step after the other."""
    with attach(family.model, arena) as attachment:
        results = []
        for name in names:
            with attachment.step([name]):
                results.append(family.model(TOKENS, use_cache=False).logits)
    alone = [family.alone(name, TOKENS) for name in names]
    return all(
        torch.allclose(got[..., : expected.shape[2]], expected, rtol=1e-4, atol=1e-4)
        for got, expected in zip(results, alone, strict=True)
    )


class TestLife:
    def test_added_tenants_are_resident(self, family, arena):
        assert residents(arena) == {"a", "b", "c", "d"}
        assert arena.stats().free_slots == 0
        assert len(set(arena.resident(["a", "b", "c", "d"]))) == 4
        assert arena.resident(["c", None, "c"])[1] == -1
        assert "a" in arena and "z" not in arena

    def test_an_evicted_tenant_comes_back(self, family, arena):
        free = arena.stats().free_bytes
        size = arena.tenant_bytes("b")
        arena.evict("b")
        arena.evict("b")
        assert residents(arena) == {"a", "c", "d"}
        assert arena.stats().free_bytes == free + size
        assert serves(family, arena, ["a", "b", "c"])
        assert residents(arena) == {"a", "b", "c", "d"}
        assert arena.stats().free_bytes == free

    def test_contexts_are_switched_behind_uploads_and_captures(self, arena):
        now, switches = [0.0], []
        arena._quiet = QuietSwitch(lambda: switches.append(now[0]), lambda: now[0])

        def switched_by_a_step_at(seconds):
            now[0] = seconds
            with arena.step(["a"]):
                return switches.count(seconds) == 1

        assert switched_by_a_step_at(1.0)
        arena.evict("b")
        arena.resident(["b"])
        assert not switched_by_a_step_at(1.01)
        assert switched_by_a_step_at(1.2)
        assert not switched_by_a_step_at(1.3)
        arena.acquire_graph()
        assert switched_by_a_step_at(1.4)
        arena.release_graph()

    def test_the_rows_of_an_evicted_tenant_are_empty(self, arena):
        [slot] = arena.resident(["b"])
        assert arena.directory[:, slot].any()
        arena.evict("b")
        assert not arena.directory[:, slot].any()

    def test_a_removed_tenant_is_forgotten(self, arena):
        arena.remove("b")
        assert arena.names == ["a", "c", "d"]
        with pytest.raises(ArenaError, match="no tenant 'b'; there are a, c, d"):
            arena.resident(["b"])

    def test_names_come_from_files(self, family):
        arena = Arena.for_model(family.model, capacity_bytes=8 << 20)
        assert arena.add(family.deltas["a"]).name == "delta"
        with pytest.raises(ArenaError, match="a tenant 'delta' is there already"):
            arena.add(family.deltas["b"])

    def test_an_open_delta_may_be_closed(self, family):
        arena = Arena.for_model(family.model, capacity_bytes=8 << 20)
        with Delta.open(family.deltas["a"]) as delta:
            tenant = arena.add(delta, "a")
        arena.evict("a")
        assert serves(family, arena, ["a"])
        assert arena["a"] is tenant


def test_tenants_come_while_the_arena_is_attached(family, tmp_path):
    """One with rotary embeddings of its own, and one whose base must be checked."""
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    path = finetune(family.base, tmp_path, edit=lambda folder: edit_config(folder, rope_parameters=rope))
    with Delta.open(path) as delta, torch.no_grad(), attach(family.model, delta):
        expected = family.model(TOKENS, use_cache=False).logits
    arena = Arena.for_model(family.model, capacity_bytes=8 << 20)
    with torch.no_grad(), attach(family.model, arena) as attachment:
        arena.add(family.deltas["a"], "a")
        with attachment.step(["a"]):
            family.model(TOKENS, use_cache=False)
        arena.add(path, "far")
        with attachment.step(["far"]):
            got = family.model(TOKENS, use_cache=False).logits
    assert torch.allclose(got[..., :56], expected, rtol=1e-4, atol=1e-4)


def test_models_that_are_no_such_decoder():
    with pytest.raises(AttachError, match=r"the model has no model\.embed_tokens\.weight"):
        Arena.for_model(torch.nn.Linear(8, 8), capacity_bytes=1 << 20)


class TestLeastRecentlyUsed:
    def test_the_oldest_makes_room(self, family):
        arena = family.arena(slots=2)
        assert residents(arena) == {"c", "d"}
        with arena.step(["c"]):
            pass
        arena.resident(["a"])
        assert residents(arena) == {"a", "c"}

    def test_all_are_served_by_an_arena_for_two(self, family):
        assert serves(family, family.arena(slots=2), ["a", "b", "c", "d", "a", "c"])

    def test_bytes_make_room_too(self, family):
        size = family.arena().tenant_bytes("a")
        arena = family.arena(capacity_bytes=2 * size + size // 2, slots=4)
        assert len(residents(arena)) == 2
        assert serves(family, arena, ["a", "b", "c", "d"])

    def test_pinned_tenants_stay(self, family):
        arena = family.arena(slots=2)
        arena.pin("a")
        arena.pin("a")
        arena.resident(["b"])
        arena.resident(["c"])
        assert residents(arena) == {"a", "c"}
        with pytest.raises(ArenaError, match="tenant 'a' is pinned"):
            arena.evict("a")
        arena.unpin("a")
        with pytest.raises(ArenaError, match="tenant 'a' is pinned"):
            arena.remove("a")
        arena.unpin("a")
        with pytest.raises(ArenaError, match="tenant 'a' is not pinned"):
            arena.unpin("a")
        arena.resident(["b", "d"])
        assert residents(arena) == {"b", "d"}

    def test_a_step_keeps_its_tenants(self, family):
        arena = family.arena(slots=2)
        with arena.step(["a", "b"]), pytest.raises(ArenaFullError, match=r"tenant 'c' does not fit: .*slots"):
            arena.resident(["c"])
        assert residents(arena) == {"a", "b"}
        arena.resident(["c"])
        assert "c" in residents(arena)

    def test_a_step_of_more_than_fit(self, family):
        arena = family.arena(slots=2)
        with pytest.raises(ArenaFullError, match=r"all 2 slots are taken.*nothing is left to evict"):
            arena.resident(["a", "b", "c"])
        assert serves(family, arena, ["a", "b"])

    def test_a_tenant_that_never_fits(self, family):
        size = family.arena().tenant_bytes("a")
        arena = Arena.for_model(family.model, capacity_bytes=size // 2)
        with pytest.raises(ArenaFullError, match=f"tenant 'a' takes {size} bytes, the arena has"):
            arena.add(family.deltas["a"], "a")
        assert not arena.names
        assert arena.stats().free_slots == arena.stats().slot_count

    def test_a_tenant_that_does_not_fit_beside_pinned_ones_is_none(self, family):
        arena = family.arena(slots=4)
        for name in "abcd":
            arena.pin(name)
        with pytest.raises(ArenaFullError, match="'e' does not fit"):
            arena.add(family.deltas["a"], "e")
        assert arena.names == ["a", "b", "c", "d"]


def handmade(family, path, records):
    """A delta file of hand-made records."""
    checkpoint = Checkpoint.open(family.base)
    tuned = TunedInfo("handmade", None, None, "F32", checkpoint.tensor_bytes)
    architecture = Architecture(checkpoint.model_type, checkpoint.tied)
    return write_delta(path, Header("test", checkpoint.identity(), tuned, architecture, {"name": "handmade"}), records)


def exact(shape, value=0.5):
    return ExactArray(np.full(shape, value, np.float32), "F32")


FACTORED = random_factored(np.random.default_rng(0), (56, 64), [Band(2, 5)])


class TestRefusals:
    def refused(self, family, path, message):
        arena = Arena.for_model(family.model, capacity_bytes=8 << 20)
        with pytest.raises(AttachError, match=message):
            arena.add(path, "x")
        assert not arena.names
        assert arena.stats().free_bytes == arena.stats().bytes

    def test_another_base(self, family, tmp_path):
        other = Family(family.folder, load(tiny_checkpoint(tmp_path / "other", dtype=torch.float32, seed=5)))
        self.refused(other, family.deltas["a"], r"not those of the base .*; accept_base")
        arena = Arena.for_model(other.model, capacity_bytes=8 << 20)
        assert arena.add(family.deltas["a"], accept_base=True)

    def test_another_shape(self, family, tmp_path):
        other = Family(family.folder, load(tiny_checkpoint(tmp_path / "other", dtype=torch.float32, layers=1)))
        arena = Arena.for_model(other.model, capacity_bytes=8 << 20)
        with pytest.raises(
            AttachError, match=r"model\.layers\.1\..*: the model has no such parameter|num_hidden_layers"
        ):
            arena.add(family.deltas["a"], accept_base=True)

    def test_groups_that_kernels_do_not_take(self, family, tmp_path):
        tuned = perturbed(family.base, tmp_path / "tuned")
        options = CompressionOptions(Recipe(bands="2:*", ratio=3 / 4, group_size=32), "none")
        path = compress(family.base, tuned, tmp_path / "d.safetensors", options)
        self.refused(
            family, path, r"model\.layers\.0\..*_proj\.weight: .*group_size 32, the kernels take multiples of 128"
        )

    def test_dense_projections(self, family, tmp_path):
        tuned = perturbed(family.base, tmp_path / "tuned")
        path = compress_bitdelta(family.base, tuned, tmp_path / "d.safetensors", BitDeltaOptions("none"))
        self.refused(family, path, "a dense record is served in lm_head and embeddings only")

    def test_a_vocabulary_beyond_the_arena_s(self, family, tmp_path):
        grown = finetune(family.base, tmp_path, added_tokens=3)
        arena = Arena.for_model(family.model, capacity_bytes=8 << 20, vocabulary=family.model.config.vocab_size)
        with pytest.raises(AttachError, match="a vocabulary of 59, the arena takes up to 56"):
            arena.add(grown)

    @pytest.mark.parametrize(
        ("name", "record", "message"),
        [
            ("model.layers.0.self_attn.q_proj.bias", ReplaceRecord(exact(64)), "the model has no such parameter"),
            ("model.norm.weight", ReplaceRecord(exact(3)), r"shape \[64\], the delta \[3\]"),
            (
                "model.norm.weight",
                RowsRecord((64, 1), np.zeros(0, np.int32), exact((0, 1))),
                r"shape \[64\], the delta",
            ),
            ("model.layers.0.mlp.up_proj.weight", ReplaceRecord(exact((160, 64))), "a replace record is served in"),
            ("lm_head.weight", ReplaceRecord(exact((56, 64), 1e6)), "values beyond float16"),
            ("model.embed_tokens.weight", FACTORED, "a factored record is served in linear layers only"),
            ("lm_head.weight", FACTORED, "a factored record of 56 rows .* make it with vocabulary=56"),
        ],
    )
    def test_records_that_fit_nowhere(self, family, tmp_path, name, record, message):
        self.refused(family, handmade(family, tmp_path / "d.safetensors", {name: record}), message)

    def test_a_library_that_is_not_built(self, family, monkeypatch):
        native.native_library.cache_clear()
        monkeypatch.setenv("DELTAWEAVE_LIBRARY", "/nonexistent/libdeltaweave.so")
        with pytest.raises(LibraryError, match="does not load"):
            Arena.for_model(family.model, capacity_bytes=1 << 20)


def test_a_factored_lm_head(family, tmp_path):
    path = handmade(family, tmp_path / "d.safetensors", {"lm_head.weight": FACTORED})
    arena = Arena.for_model(family.model, capacity_bytes=1 << 20, vocabulary=56)
    arena.add(path, "head")
    with torch.no_grad(), attach(family.model, arena) as attachment, attachment.step(["head"]):
        got = family.model(TOKENS, use_cache=False).logits
    with Delta.open(path) as delta, torch.no_grad(), attach(family.model, delta):
        expected = family.model(TOKENS, use_cache=False).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, family.alone(None, TOKENS), atol=0.1)


def test_a_fine_tune_without_records(family, tmp_path):
    """Nothing but carried files: it takes a slot and no bytes."""
    arena = Arena.for_model(family.model, capacity_bytes=1 << 20)
    arena.add(handmade(family, tmp_path / "d.safetensors", {}), "empty")
    assert arena.stats().free_bytes == arena.stats().bytes
    with torch.no_grad(), attach(family.model, arena) as attachment, attachment.step(["empty"]):
        got = family.model(TOKENS, use_cache=False).logits
    assert torch.allclose(got[..., :56], family.alone(None, TOKENS), rtol=1e-5, atol=1e-5)
