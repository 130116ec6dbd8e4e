# SPDX-License-Identifier: Apache-2.0
"""`generate`: streamed text of base + delta is that of the dense fine-tune, with the fine-tune's own settings."""

import json

import pytest
import torch
from deltaweave.converter import Checkpoint, CheckpointError, CompressionOptions, Recipe, apply, compress
from deltaweave.formats import DeltaweaveError, write_fusion
from deltaweave.runtime_plugin.pytorch import attach
from fusions import make_fusion
from helpers import perturbed, tiny_checkpoint

from deltaweave.evaluation.tasks import complete
from deltaweave.generation import generate
from deltaweave.models import load_checkpoint, load_tokenizer

TEMPLATE = "?{{ messages[0]['content'] }}!{% if add_generation_prompt %}<added0>{% endif %}"


def make_pair(folder, **settings):
    """A pair whose fine-tune brings a chat template, added tokens and generation settings."""
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    tuned = perturbed(base, folder / "tuned", added_tokens=2)
    (tuned / "chat_template.jinja").write_text(TEMPLATE)
    (tuned / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 1, **settings}))
    options = CompressionOptions(Recipe(bands="8:2,2:*", ratio=3 / 4, group_size=32), "none")
    delta = compress(base, tuned, folder / "d.safetensors", options)
    dense = apply(base, delta, folder / "dense")
    return base, delta, load_checkpoint(dense), load_tokenizer(dense)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_text_is_the_dense_fine_tune_s(pair):
    base, delta, dense, tokenizer = pair
    pieces = []
    text = generate(base, delta, "the dog", max_new_tokens=12, write=pieces.append, dtype=torch.float32)
    assert text == complete(dense, tokenizer, ["the dog"], 12)[0]
    assert "".join(pieces) == text
    assert text


def test_text_comes_in_pieces(pair):
    base, delta, dense, tokenizer = pair
    prompt = next(p for p in "abcdefghijklmnopqrstuvwxyz" if " " in complete(dense, tokenizer, [p], 40)[0].strip())
    pieces = []
    generate(base, delta, prompt, max_new_tokens=40, write=pieces.append)
    assert len([piece for piece in pieces if piece]) > 1


def test_chat_uses_the_fine_tune_s_template(pair):
    base, delta, dense, tokenizer = pair
    assert (
        generate(base, delta, "dog", chat=True, max_new_tokens=8) == complete(dense, tokenizer, ["?dog!<added0>"], 8)[0]
    )


def test_settings_of_the_fine_tune_are_followed(tmp_path):
    plain = make_pair(tmp_path / "plain")
    penalized = make_pair(tmp_path / "penalized", repetition_penalty=50.0)
    texts = [generate(base, delta, "the dog", max_new_tokens=20) for base, delta, *_ in (plain, penalized)]
    plain_tokens, tokens = (plain[3](text)["input_ids"] for text in texts)
    assert len(set(plain_tokens)) < len(plain_tokens)
    assert len(set(tokens)) == len(tokens), "such a penalty repeats no token"


def test_sampling_is_seeded(pair):
    base, delta, *_ = pair
    settings = {"max_new_tokens": 12, "temperature": 2.0}
    texts = [generate(base, delta, "dog", seed=seed, **settings) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_is_greedy(tmp_path):
    base, delta, dense, tokenizer = make_pair(tmp_path, do_sample=True, temperature=5.0, top_k=40)
    assert generate(base, delta, "dog", max_new_tokens=12, temperature=0) == complete(dense, tokenizer, ["dog"], 12)[0]


def test_another_base_is_refused(pair, tmp_path):
    _, delta, *_ = pair
    other = tiny_checkpoint(tmp_path / "other", dtype=torch.float32, seed=3)
    with pytest.raises(CheckpointError, match="is not the base"):
        generate(other, delta, "dog")
    assert isinstance(generate(other, delta, "dog", max_new_tokens=2, accept_base=True), str)


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(DeltaweaveError, match="prompt holds no tokens"):
        generate(*pair[:2], "")


def test_chat_without_a_template_is_refused(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned")
    delta = compress(
        base, tuned, tmp_path / "d.safetensors", CompressionOptions(Recipe(bands="2:4", group_size=32), "none")
    )
    with pytest.raises(DeltaweaveError, match="no chat template"):
        generate(base, delta, "dog", chat=True)


def test_a_fusion_on_the_base(pair, tmp_path):
    base = pair[0]
    fusion = make_fusion(count=2, base=Checkpoint.open(base).identity())
    path = write_fusion(tmp_path / "fusion.safetensors", fusion)
    model, tokenizer = load_checkpoint(base), load_tokenizer(base)
    plain = complete(model, tokenizer, ["the dog"], 12)[0]
    with attach(model, fusion):
        expected = complete(model, tokenizer, ["the dog"], 12)[0]
    assert generate(base, path, "the dog", max_new_tokens=12, temperature=0, device="cpu") == expected != plain
    other = write_fusion(tmp_path / "other.safetensors", make_fusion(count=2))
    with pytest.raises(CheckpointError, match="other"):
        generate(base, other, "the dog")
