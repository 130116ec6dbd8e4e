# SPDX-License-Identifier: Apache-2.0
"""`attach(model, arena)`: every row of a mixed batch computes what its fine-tune computes alone."""

import pytest
import torch
from deltaweave.runtime_plugin.pytorch import Arena, AttachError, OpError, attach
from family import Family, edit_config, load
from helpers import FAMILIES, tiny_checkpoint
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("native")
TOKENS = torch.arange(3, 43).view(2, 20)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def check(family, arena, *, tokens=TOKENS[0], tenants=None, tolerance=1e-5):
    """All tenants and the base in one batch against each alone; restores the base bit for bit."""
    rows = [None, *arena.names] if tenants is None else tenants
    batch = tokens.repeat(len(rows), 1)
    alone = [family.alone(name, tokens[None])[0] for name in rows]
    modules = dict(family.model.named_modules())
    with attach(family.model, arena) as attachment:
        with attachment.step(rows):
            mixed = family.model(batch, use_cache=False).logits
        with attachment.step(rows[::-1]):
            turned = family.model(batch, use_cache=False).logits
    assert dict(family.model.named_modules()) == modules
    for got, expected in zip(mixed, alone, strict=True):
        known = expected.shape[1]
        assert (got[:, :known] - expected).norm() <= tolerance * expected.norm()
        assert (got[:, known:] == -torch.inf).all()
    # A row's values do not depend on where it stands.
    assert torch.allclose(turned.flip(0), mixed, rtol=1e-4, atol=1e-4)
    return alone


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_families(tmp_path, name, tied):
    family = Family.make(tmp_path, name, tied=tied)
    family.add("one", seed=1)
    family.add("two", seed=2, embeddings=False)
    alone = check(family, family.arena())
    assert (alone[1] - alone[2]).norm() > 0.1 * alone[0].norm(), "the fine-tunes differ"


@pytest.mark.parametrize("policy", ["8bit", "exact", "base"])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabularies_of_different_sizes(tmp_path, tied, policy):
    family = Family.make(tmp_path, tied=tied)
    family.add("more", added_tokens=3, policy=policy)
    family.add("same", seed=2, policy=policy)
    family.add("most", added_tokens=9, seed=3, policy=policy)
    check(family, family.arena(vocabulary=family.model.config.vocab_size + 9), tolerance=1e-3)
    rows = family.model.config.vocab_size + 3
    check(family, family.arena(), tokens=torch.arange(rows - 12, rows), tenants=["more", "most"], tolerance=1e-3)


def test_a_few_changed_rows(tmp_path):
    family = Family.make(tmp_path, dtype=torch.bfloat16)

    def change(tensors):
        for name in (EMBEDDING, HEAD):
            tensors[name][7] += 1

    family.add("rows", embeddings=False, edit=lambda folder: edit_weights(folder, change))
    check(family, family.arena())


def test_a_tied_base_of_an_untied_fine_tune(tmp_path):
    family = Family.make(tmp_path, tied=True)

    def untie(folder):
        edit_weights(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0).contiguous()}))
        edit_config(folder, tie_word_embeddings=False)

    family.add("untied", edit=untie)
    family.add("tied", seed=2)
    check(family, family.arena())


@pytest.mark.parametrize("embeddings", [False, True])
def test_an_untied_base_of_a_tied_fine_tune(tmp_path, embeddings):
    family = Family.make(tmp_path)

    def tie(folder):
        edit_weights(folder, lambda tensors: tensors.pop(HEAD))
        edit_config(folder, tie_word_embeddings=True)

    family.add("tied", embeddings=embeddings, edit=tie)
    family.add("untied", seed=2)
    check(family, family.arena(), tolerance=1e-3)  # lm_head's rows come in float16


def test_rotary_embeddings_differ_by_row(tmp_path):
    family = Family.make(tmp_path)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    family.add("far", edit=lambda folder: edit_config(folder, rope_parameters=rope))
    scaled = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    family.add("scaled", edit=lambda folder: edit_config(folder, rope_parameters=scaled))
    family.add("near")
    check(family, family.arena())


def test_attention_biases(tmp_path):
    """Qwen2's q, k and v have biases, o has none; Llama may have all."""
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    edit_config(base, attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(0)

    def bias(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name.replace("weight", "bias")] = 0.1 * torch.randn(len(tensors[name]), generator=generator)

    edit_weights(base, bias)
    family = Family(tmp_path, load(base))
    family.add("one", seed=1)
    family.add("two", seed=2)
    check(family, family.arena())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models(tmp_path, dtype):
    family = Family.make(tmp_path, dtype=dtype)
    family.add("one")
    family.add("two", seed=2)
    exact = [family.alone(name, TOKENS[:1])[0] for name in (None, "one", "two")]
    family.model = load(family.base, dtype)
    with torch.no_grad(), attach(family.model, family.arena()) as attachment, attachment.step([None, "one", "two"]):
        mixed = family.model(TOKENS[[0, 0, 0]], use_cache=False).logits
    assert mixed.dtype == dtype
    for got, expected in zip(mixed, exact, strict=True):
        error = (got[:, : expected.shape[1]].float() - expected).norm()
        assert error <= 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(tmp_path, backend):
    """And the compiled step serves whoever its rows are of."""
    family = Family.make(tmp_path, "qwen2", layers=1)
    family.add("one")
    with torch.no_grad(), attach(family.model, family.arena()) as attachment:
        compiled = torch.compile(family.model, fullgraph=True, backend=backend)
        results = []
        for rows in (["one", None], [None, "one"]):
            with attachment.step(rows):
                results.append((compiled(TOKENS, use_cache=False).logits, family.model(TOKENS, use_cache=False).logits))
    for got, expected in results:
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0], results[1][0], atol=0.1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    family = Family.make(tmp_path_factory.mktemp("pair"))
    family.add("one")
    return family


def test_transformers_own_generation(pair):
    prompt = [5, 9, 21, 14]
    with torch.no_grad(), attach(pair.model, pair.arena()) as attachment, attachment.step(["one", None]):
        ids = torch.tensor([prompt, prompt])
        got = pair.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert [row[4:].tolist() for row in got] == [pair.greedy("one", prompt, 8), pair.greedy(None, prompt, 8)]


class TestRefusals:
    def test_an_arena_of_another_model(self, pair):
        with pytest.raises(AttachError, match="made for another model"):
            attach(load(pair.base), pair.arena())

    def test_a_second_arena(self, pair):
        arena = pair.arena()
        with attach(pair.model, arena):
            with pytest.raises(AttachError, match="attached already"):
                attach(pair.model, arena)
            with pytest.raises(AttachError, match="expected a Hugging Face decoder with nothing attached"):
                Arena.for_model(pair.model, capacity_bytes=1 << 20)

    @pytest.mark.parametrize("rows", [[], ["one"]])
    def test_another_number_of_rows(self, pair, rows):
        with (
            attach(pair.model, pair.arena()) as attachment,
            attachment.step(rows),
            pytest.raises(OpError, match=f"a batch of 2 rows, tenants were chosen for {len(rows)}"),
        ):
            pair.model(TOKENS)

    def test_too_many_tokens(self, pair):
        with (
            attach(pair.model, pair.arena()) as attachment,
            attachment.step(["one"] * 9),
            pytest.raises(OpError, match="a step of 9 x 256 tokens, expected at most 2048"),
        ):
            pair.model(torch.zeros(9, 256, dtype=torch.int64))
