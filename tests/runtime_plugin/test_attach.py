# SPDX-License-Identifier: Apache-2.0
"""`attach` against the dense fine-tune that `apply` writes: whatever a fine-tune may change is served."""

import json

import numpy as np
import pytest
import torch
from deltaweave.converter import (
    BitDeltaOptions,
    Checkpoint,
    CompressionOptions,
    Policies,
    Recipe,
    apply,
    compress,
    compress_bitdelta,
)
from deltaweave.formats import (
    Architecture,
    Band,
    Delta,
    ExactArray,
    FactoredRecord,
    Header,
    PackedBand,
    PackedMatrix,
    ReplaceRecord,
    TunedInfo,
    pack_codes,
    write_delta,
)
from deltaweave.runtime_plugin.pytorch import AttachError, attach
from helpers import FAMILIES, perturbed, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

QUICK = CompressionOptions(Recipe(bands="8:2,2:*", ratio=3 / 4, group_size=32), "none")
TOKENS = torch.arange(3, 43).view(2, 20)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def check(base, delta_path, tmp_path, tokens=TOKENS):
    """Attached logits equal those of the dense checkpoint, and detaching restores the base bit for bit."""
    apply(base, delta_path, tmp_path / "dense")
    model, dense = load(base), load(tmp_path / "dense")
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    settings = model.config.to_dict()
    with Delta.open(delta_path) as delta:
        attachment = attach(model, delta)
    expected, got = logits(dense, tokens), logits(model, tokens)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-4 * expected.norm()
    assert not torch.equal(logits(model), before)
    attachment.detach()
    attachment.detach()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.config.to_dict() == settings


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def tiny_pair(tmp_path, **tuned):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    return base, perturbed(base, tmp_path / "tuned", **tuned)


def handmade(base, path, records, files=None):
    """A delta file of hand-made records."""
    checkpoint = Checkpoint.open(base)
    architecture = Architecture(checkpoint.model_type, checkpoint.tied)
    tuned = TunedInfo("handmade", None, None, "F32", checkpoint.tensor_bytes)
    header = Header("test", checkpoint.identity(), tuned, architecture, {"name": "handmade"})
    return write_delta(path, header, records, files=files)


def random_factored(shape, rank=5):
    generator = np.random.default_rng(0)

    def matrix(length):
        codes = generator.integers(0, 8, (rank, length)).astype(np.uint8)
        grid = generator.uniform(0.05, 0.3, (rank, -(-length // 32), 2)).astype(np.float16)
        return PackedMatrix((PackedBand(Band(3, rank), pack_codes(codes, 3), grid),), length, 32)

    return FactoredRecord(shape, matrix(shape[0]), matrix(shape[1]), generator.uniform(0, 1, rank).astype(np.float32))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families(tmp_path, family, tied):
    base = tiny_checkpoint(tmp_path / "base", family, tied=tied, dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned")
    check(base, compress(base, tuned, tmp_path / "d.safetensors", QUICK), tmp_path)


@pytest.mark.parametrize("policy", ["8bit", "exact", "base"])
@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens(tmp_path, tied, policy):
    base = tiny_checkpoint(tmp_path / "base", tied=tied, dtype=torch.float32)
    edit_weights(base, lambda tensors: tensors[EMBEDDING][0].fill_(1))  # the padding token's row is zero as it is made
    tuned = perturbed(base, tmp_path / "tuned", added_tokens=3)
    options = CompressionOptions(QUICK.recipe, "none", policies=Policies(policy, policy))
    path = compress(base, tuned, tmp_path / "d.safetensors", options)
    rows = load(tuned).config.vocab_size
    check(base, path, tmp_path, torch.arange(rows - 12, rows)[None])


def test_a_few_changed_rows(tmp_path):
    """`auto` stores them exactly."""
    base, tuned = tiny_pair(tmp_path, embeddings=False)
    edit_weights(tuned, lambda tensors: [tensors[name][7].add_(1) for name in (EMBEDDING, HEAD)])
    check(base, compress(base, tuned, tmp_path / "d.safetensors", QUICK), tmp_path)


def test_untied_fine_tune_of_a_tied_base(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tied=True, dtype=torch.float32)
    tuned = perturbed(base, tmp_path / "tuned")
    edit_weights(tuned, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0).contiguous()}))
    edit_config(tuned, tie_word_embeddings=False)
    check(base, compress(base, tuned, tmp_path / "d.safetensors", QUICK), tmp_path)


@pytest.mark.parametrize("embeddings", [False, True])
def test_tied_fine_tune_of_an_untied_base(tmp_path, embeddings):
    base, tuned = tiny_pair(tmp_path, embeddings=embeddings)
    edit_weights(tuned, lambda tensors: tensors.pop(HEAD))
    edit_config(tuned, tie_word_embeddings=True)
    check(base, compress(base, tuned, tmp_path / "d.safetensors", QUICK), tmp_path)


def test_bitdelta_records(tmp_path):
    base, tuned = tiny_pair(tmp_path)
    check(base, compress_bitdelta(base, tuned, tmp_path / "d.safetensors", BitDeltaOptions("none")), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_factored_embeddings(tmp_path, tied):
    base = tiny_checkpoint(tmp_path / "base", tied=tied, dtype=torch.float32)
    records = {EMBEDDING: random_factored(Checkpoint.open(base).shape(EMBEDDING))}
    check(base, handmade(base, tmp_path / "d.safetensors", records), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_replaced_embeddings(tmp_path, tied):
    base = tiny_checkpoint(tmp_path / "base", tied=tied, dtype=torch.float32)
    values = np.random.default_rng(0).standard_normal(Checkpoint.open(base).shape(EMBEDDING)).astype(np.float32)
    records = {EMBEDDING: ReplaceRecord(ExactArray(values, "F32"))}
    check(base, handmade(base, tmp_path / "d.safetensors", records), tmp_path)


def test_rotary_embeddings_of_the_fine_tune(tmp_path):
    """Fine-tunes for longer contexts change the rotary base."""
    base, tuned = tiny_pair(tmp_path)
    edit_config(tuned, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    assert load(tuned).config.rope_parameters["rope_theta"] == 1e6
    check(base, compress(base, tuned, tmp_path / "d.safetensors", QUICK), tmp_path)


def test_generation_settings_of_the_fine_tune(tmp_path):
    base, tuned = tiny_pair(tmp_path)
    (tuned / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "do_sample": False}))
    path = compress(base, tuned, tmp_path / "d.safetensors", QUICK)
    model = load(base)
    before = model.generation_config
    with Delta.open(path) as delta, attach(model, delta):
        assert model.generation_config.repetition_penalty == 1.5
    assert model.generation_config is before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models(tmp_path, dtype):
    base = tiny_checkpoint(tmp_path / "base", dtype=dtype)
    tuned = perturbed(base, tmp_path / "tuned")
    path = compress(base, tuned, tmp_path / "d.safetensors", QUICK)
    exact, model = load(base), load(base, dtype)
    with Delta.open(path) as delta:
        attach(exact, delta)
        attach(model, delta)
    expected, got = logits(exact), logits(model)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


def test_generates_with_a_cache(tmp_path):
    base, tuned = tiny_pair(tmp_path, added_tokens=2)
    path = compress(base, tuned, tmp_path / "d.safetensors", QUICK)
    apply(base, path, tmp_path / "dense")
    model, dense = load(base), load(tmp_path / "dense")
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with Delta.open(path) as delta, attach(model, delta):
        assert torch.equal(model.generate(TOKENS, **settings), dense.generate(TOKENS, **settings))


def test_works_as_a_context(tmp_path):
    base, tuned = tiny_pair(tmp_path)
    path = compress(base, tuned, tmp_path / "d.safetensors", QUICK)
    model = load(base)
    before = logits(model)
    with pytest.raises(KeyError), Delta.open(path) as delta, attach(model, delta):
        assert not torch.equal(logits(model), before)
        raise KeyError
    assert torch.equal(logits(model), before)


class TestRefusals:
    """The model is left as it was, and the message names what does not fit."""

    @pytest.fixture
    def path(self, tmp_path):
        base, tuned = tiny_pair(tmp_path)
        return compress(base, tuned, tmp_path / "d.safetensors", QUICK)

    def refused(self, model, path, message, **options):
        before = logits(model)
        with Delta.open(path) as delta, pytest.raises(AttachError, match=message):
            attach(model, delta, **options)
        assert torch.equal(logits(model), before)

    def test_another_width(self, tmp_path, path):
        model = load(tiny_checkpoint(tmp_path / "other", hidden=128))
        self.refused(model, path, r"the model has shape \[.*\], the delta \[")

    def test_fewer_layers(self, tmp_path, path):
        model = load(tiny_checkpoint(tmp_path / "short", layers=1))
        self.refused(model, path, r"the model has no module model\.layers\.1\.")

    def test_another_family(self, tmp_path, path):
        self.refused(load(tiny_checkpoint(tmp_path / "other", "qwen3")), path, "the model is a qwen3, .* of a llama")

    def test_another_base_of_the_same_shape(self, tmp_path, path):
        other = load(tiny_checkpoint(tmp_path / "other", seed=5))
        self.refused(other, path, r"not those of the base .*; accept_base")
        with Delta.open(path) as delta, attach(other, delta, accept_base=True):
            logits(other)

    def test_a_lossy_cast(self, tmp_path, path):
        self.refused(load(tmp_path / "base", torch.bfloat16), path, "not those of the base")

    def test_a_second_delta(self, tmp_path, path):
        model = load(tmp_path / "base")
        with Delta.open(path) as delta, attach(model, delta):
            self.refused(model, path, "has a delta attached already")

    def test_another_computation(self, tmp_path):
        base = tiny_checkpoint(tmp_path / "base2", dtype=torch.float32)
        tuned = perturbed(base, tmp_path / "tuned2")
        edit_config(tuned, rms_norm_eps=1e-2)
        path = compress(base, tuned, tmp_path / "e.safetensors", QUICK)
        self.refused(load(base), path, "config.json: the model has rms_norm_eps 1e-06, the delta 0.01")

    @pytest.mark.parametrize(
        ("name", "message"),
        [("model.norm.shift", "model.norm has no shift"), ("model.norm.weight", r"shape \[64\], the delta \[3\]")],
    )
    def test_values_that_fit_nowhere(self, tmp_path, name, message):
        base = tiny_checkpoint(tmp_path / "base2", dtype=torch.float32)
        records = {name: ReplaceRecord(ExactArray(np.zeros(3, np.float32), "F32"))}
        self.refused(load(base), handmade(base, tmp_path / "e.safetensors", records), message)

    def test_a_matrix_for_a_norm(self, tmp_path):
        base = tiny_checkpoint(tmp_path / "base2", dtype=torch.float32)
        records = {"model.norm.weight": random_factored((64, 64))}
        self.refused(load(base), handmade(base, tmp_path / "e.safetensors", records), "has a LlamaRMSNorm there")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (b"not json", "config.json is not JSON"),
            (b"[1]", "config.json holds list, expected an object"),
            (b'{"hidden_size": "wide"}', "config.json is unusable"),
            (b'{"vocab_size": 99}', "56 rows for a vocabulary of 99"),
            (b'{"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}}', "unusable rope_parameters"),
        ],
    )
    def test_damaged_settings(self, tmp_path, config, message):
        base = tiny_checkpoint(tmp_path / "base2", dtype=torch.float32)
        if config.startswith(b"{"):
            config = json.dumps(json.loads((base / "config.json").read_text()) | json.loads(config)).encode()
        records = {EMBEDDING: random_factored(Checkpoint.open(base).shape(EMBEDDING))}
        path = handmade(base, tmp_path / "e.safetensors", records, {"config.json": config})
        self.refused(load(base), path, message)


def test_a_bias_where_the_base_has_none(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    model = load(base)
    before = logits(model)
    name = "model.layers.0.self_attn.q_proj.bias"
    records = {
        name: ReplaceRecord(ExactArray(np.ones(64, np.float32), "F32")),
        name.replace("bias", "weight"): random_factored((64, 64)),
    }
    with Delta.open(handmade(base, tmp_path / "d.safetensors", records)) as delta:
        with attach(model, delta):
            projection = model.model.layers[0].self_attn.q_proj
            x = torch.randn(3, 64)
            weight = projection.base.weight + torch.from_numpy(delta.dequantize(name.replace("bias", "weight")))
            assert torch.allclose(projection(x), x @ weight.T + 1, rtol=1e-4, atol=1e-4)
        assert model.model.layers[0].self_attn.q_proj.bias is None
    assert torch.equal(logits(model), before)
