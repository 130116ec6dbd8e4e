# SPDX-License-Identifier: Apache-2.0
"""What becomes of everything that is not a projection: exact, eight bits, left out, or left at the base."""

import json

import numpy as np
import pytest
import torch
from deltaweave.converter import (
    Checkpoint,
    CompressionOptions,
    Policies,
    Recipe,
    apply,
    compress,
    tuned_names,
    tuned_tensor,
)
from deltaweave.converter.policies import other_bytes, other_record
from deltaweave.formats import (
    BaseRecord,
    Delta,
    DenseRecord,
    ReplaceRecord,
    RowsRecord,
    dense_bytes,
)
from helpers import perturbed, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GROUP = 32
ROWS = 56  # of tiny checkpoints: five percent are 2.8 rows


@pytest.fixture
def base(tmp_path):
    return tiny_checkpoint(tmp_path / "base")


def edited(base, folder, change):
    """A fine-tune with untouched embeddings, but for what `change` does to its tensors."""
    tuned = perturbed(base, folder, embeddings=False)
    tensors = load_file(tuned / "model.safetensors")
    change(tensors)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    return tuned


def with_rows(base, folder, rows, name=EMBEDDING):
    def change(tensors):
        tensors[name][rows] += 0.25

    return edited(base, folder, change)


def configured(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def record_of(base, tuned, policy, name=EMBEDDING):
    policies = Policies(embeddings=policy) if name == EMBEDDING else Policies(lm_head=policy)
    return other_record(Checkpoint.open(base), Checkpoint.open(tuned), name, policies, GROUP)


def compressed(base, tuned, folder, policies=None):
    """(delta path, the checkpoints' tensors by name as base + delta has them)."""
    recipe = Recipe(bands="16:full", ratio=1.0, group_size=GROUP, overrides={"k_proj": "8:full"})
    out = compress(
        base, tuned, folder / "d.safetensors", CompressionOptions(recipe, "none", policies=policies or Policies())
    )
    checkpoint = Checkpoint.open(base)
    with Delta.open(out) as delta:
        return out, {name: tuned_tensor(checkpoint, delta, name) for name in tuned_names(checkpoint, delta)}


class TestOneRecord:
    @pytest.mark.parametrize("policy", ["auto", "exact", "8bit", "base"])
    @pytest.mark.parametrize("name", [EMBEDDING, HEAD])
    def test_equal_to_the_base_means_no_record(self, base, tmp_path, policy, name):
        tuned = perturbed(base, tmp_path / "tuned", embeddings=False)
        assert record_of(base, tuned, policy, name) is None

    @pytest.mark.parametrize("name", [EMBEDDING, HEAD])
    def test_few_changed_rows_are_exact(self, base, tmp_path, name):
        tuned = with_rows(base, tmp_path / "tuned", [7, 50], name)
        record = record_of(base, tuned, "auto", name)
        assert isinstance(record, RowsRecord)
        assert record.indices.tolist() == [7, 50]
        expected = Checkpoint.open(tuned).tensor(name)[[7, 50]].float().numpy()
        assert np.array_equal(record.values.to_float32(), expected)

    @pytest.mark.parametrize("name", [EMBEDDING, HEAD])
    def test_from_five_percent_on_they_take_eight_bits(self, base, tmp_path, name):
        tuned = with_rows(base, tmp_path / "tuned", [7, 8, 50], name)
        record = record_of(base, tuned, "auto", name)
        assert isinstance(record, DenseRecord)
        assert [piece.band.bits for piece in record.matrix.bands] == [8]
        assert record.matrix.group_size == GROUP

    def test_eight_bits_leave_unchanged_rows_as_they_are(self, base, tmp_path):
        tuned = with_rows(base, tmp_path / "tuned", [7, 8, 50])
        change = record_of(base, tuned, "auto").dequantize()
        assert np.flatnonzero(change.any(1)).tolist() == [7, 8, 50]

    def test_eight_bits_are_within_half_a_step(self, base, tmp_path):
        tuned = perturbed(base, tmp_path / "tuned")
        record = record_of(base, tuned, "8bit")
        truth = (
            Checkpoint.open(tuned).tensor(EMBEDDING).float() - Checkpoint.open(base).tensor(EMBEDDING).float()
        ).numpy()
        groups = truth.reshape(ROWS, -1, GROUP)
        step = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / 255
        # The zero point is rounded too, and the scale is a float16.
        allowed = np.repeat(step, GROUP, axis=1) * 1.2
        assert (np.abs(record.dequantize() - truth) <= allowed).all()
        error = np.linalg.norm(record.dequantize() - truth) / np.linalg.norm(truth)
        assert record.quality["weight_error"] == pytest.approx(error, rel=1e-4)
        assert 0 < error < 0.01

    def test_exact_stores_every_changed_row_however_many(self, base, tmp_path):
        tuned = perturbed(base, tmp_path / "tuned")
        record = record_of(base, tuned, "exact")
        assert isinstance(record, RowsRecord)
        assert len(record.indices) == ROWS

    @pytest.mark.parametrize("policy", ["8bit", "base"])
    def test_one_changed_row_does_not_override_a_choice(self, base, tmp_path, policy):
        tuned = with_rows(base, tmp_path / "tuned", [7])
        kind = {"8bit": DenseRecord, "base": BaseRecord}[policy]
        assert isinstance(record_of(base, tuned, policy), kind)

    def test_choices_for_embeddings_and_head_are_apart(self, base, tmp_path):
        tuned = perturbed(base, tmp_path / "tuned")
        policies = Policies(embeddings="base", lm_head="exact")
        found = [
            other_record(Checkpoint.open(base), Checkpoint.open(tuned), name, policies, GROUP)
            for name in (EMBEDDING, HEAD)
        ]
        assert [type(record) for record in found] == [BaseRecord, RowsRecord]

    def test_blocks_of_rows_change_nothing(self, base, tmp_path, monkeypatch):
        tuned = perturbed(base, tmp_path / "tuned", added_tokens=3)
        whole = {policy: record_of(base, tuned, policy) for policy in ("exact", "8bit")}
        monkeypatch.setattr("deltaweave.converter.policies.CHUNK_ROWS", 10)
        assert np.array_equal(record_of(base, tuned, "exact").indices, whole["exact"].indices)
        assert np.array_equal(record_of(base, tuned, "8bit").dequantize(), whole["8bit"].dequantize())

    @pytest.mark.parametrize("policy", ["auto", "exact", "8bit", "base"])
    @pytest.mark.parametrize("rows", [[7], list(range(30))])
    def test_bytes_are_foretold(self, base, tmp_path, policy, rows):
        tuned = with_rows(base, tmp_path / "tuned", rows)
        record = record_of(base, tuned, policy)
        foretold = other_bytes(Checkpoint.open(base), Checkpoint.open(tuned), EMBEDDING, Policies(policy), GROUP)
        if isinstance(record, BaseRecord):
            assert foretold == 0
        elif isinstance(record, RowsRecord):
            assert foretold == record.values.data.nbytes + record.indices.nbytes
        else:
            assert foretold == dense_bytes((ROWS, 64), 8, GROUP).total


class TestSizesOfVocabularies:
    def test_added_rows_are_stored_and_others_left_out(self, base, tmp_path):
        tuned = perturbed(base, tmp_path / "tuned", embeddings=False, added_tokens=2)
        for name in (EMBEDDING, HEAD):
            record = record_of(base, tuned, "auto", name)
            assert isinstance(record, RowsRecord)
            assert record.shape == (ROWS + 2, 64)
            assert record.indices.tolist() == [ROWS, ROWS + 1]

    def test_an_added_row_of_zeros_counts_as_changed(self, base, tmp_path):
        def grow(tensors):
            for name in (EMBEDDING, HEAD):
                tensors[name] = torch.cat([tensors[name], torch.zeros(1, 64, dtype=torch.bfloat16)])

        tuned = configured(edited(base, tmp_path / "tuned", grow), vocab_size=ROWS + 1)
        assert record_of(base, tuned, "auto").indices.tolist() == [ROWS]

    @pytest.mark.parametrize("policy", ["auto", "exact", "8bit"])
    @pytest.mark.parametrize("added", [2, 20])
    def test_grown(self, base, tmp_path, policy, added):
        tuned = perturbed(base, tmp_path / "tuned", added_tokens=added)
        out, got = compressed(base, tuned, tmp_path, Policies(policy, policy))
        for name in (EMBEDDING, HEAD):
            expected = Checkpoint.open(tuned).tensor(name).float()
            assert got[name].shape == (ROWS + added, 64)
            error = (got[name].float() - expected).norm() / expected.norm()
            assert error == 0 if policy == "exact" else 0 < error < 0.01
        self.loads(base, out, tmp_path, ROWS + added)

    @pytest.mark.parametrize("policy", ["auto", "exact", "8bit"])
    @pytest.mark.parametrize("changed", [0, 2, 30])
    def test_shrunk(self, base, tmp_path, policy, changed):
        def shrink(tensors):
            for name in (EMBEDDING, HEAD):
                tensors[name] = tensors[name][: ROWS - 10].clone()
                tensors[name][:changed] += 0.25

        tuned = configured(edited(base, tmp_path / "tuned", shrink), vocab_size=ROWS - 10)
        out, got = compressed(base, tuned, tmp_path, Policies(policy, policy))
        for name in (EMBEDDING, HEAD):
            expected = Checkpoint.open(tuned).tensor(name)
            assert got[name].shape == expected.shape
            assert torch.equal(got[name][changed:], expected[changed:])
            assert torch.allclose(got[name].float(), expected.float(), atol=0.25 / 255 + 2**-8)
        self.loads(base, out, tmp_path, ROWS - 10)

    @pytest.mark.parametrize("rows", [ROWS + 4, ROWS - 10])
    def test_left_at_the_base(self, base, tmp_path, rows):
        """Rows that the base lacks are zero then, and those that the fine-tune lacks are gone."""

        def resize(tensors):
            for name in (EMBEDDING, HEAD):
                tensors[name] = torch.cat([tensors[name], tensors[name][:4]])[:rows].clone()

        tuned = configured(edited(base, tmp_path / "tuned", resize), vocab_size=rows)
        out, got = compressed(base, tuned, tmp_path, Policies("base", "base"))
        before, known = Checkpoint.open(base).tensor(EMBEDDING), min(rows, ROWS)
        assert got[EMBEDDING].shape == (rows, 64)
        assert torch.equal(got[EMBEDDING][:known], before[:known])
        assert not got[EMBEDDING][known:].any()
        self.loads(base, out, tmp_path, rows)

    def loads(self, base, out, folder, rows):
        """Transformers takes what `apply` makes of it."""
        model = AutoModelForCausalLM.from_pretrained(apply(base, out, folder / "dense"))
        assert model.get_input_embeddings().weight.shape[0] == rows
        assert model.get_output_embeddings().weight.shape[0] == rows


class TestTied:
    def test_one_record_for_both(self, tmp_path):
        base = tiny_checkpoint(tmp_path / "base", tied=True)
        tuned = perturbed(base, tmp_path / "tuned", added_tokens=2)
        out, got = compressed(base, tuned, tmp_path, Policies(embeddings="exact", lm_head="base"))
        assert HEAD not in got
        with Delta.open(out) as delta:
            assert HEAD not in delta.names
            assert isinstance(delta.record(EMBEDDING), RowsRecord)
        assert torch.equal(got[EMBEDDING], Checkpoint.open(tuned).tensor(EMBEDDING))
        model = AutoModelForCausalLM.from_pretrained(apply(base, out, tmp_path / "dense"))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @pytest.mark.parametrize("head", ["the base's embeddings", "its own"])
    def test_untied_by_the_fine_tune(self, tmp_path, head):
        """lm_head must come out whether the fine-tune changed it, or only the embeddings it was tied to."""
        base = tiny_checkpoint(tmp_path / "base", tied=True)
        before = Checkpoint.open(base).tensor(EMBEDDING)

        def untie(tensors):
            tensors[EMBEDDING] = tensors[EMBEDDING] + 0.25
            tensors[HEAD] = before.clone() if head == "the base's embeddings" else before * 0.5

        tuned = configured(edited(base, tmp_path / "tuned", untie), tie_word_embeddings=False)
        out, got = compressed(base, tuned, tmp_path, Policies("exact", "exact"))
        for name in (EMBEDDING, HEAD):
            assert torch.equal(got[name], Checkpoint.open(tuned).tensor(name)), name
        self.same_logits(tuned, apply(base, out, tmp_path / "dense"))

    def test_tied_by_the_fine_tune(self, tmp_path):
        base = tiny_checkpoint(tmp_path / "base")
        tuned = edited(base, tmp_path / "tuned", lambda tensors: tensors.pop(HEAD))
        configured(tuned, tie_word_embeddings=True)
        out, got = compressed(base, tuned, tmp_path)
        assert HEAD not in got
        self.same_logits(tuned, apply(base, out, tmp_path / "dense"))

    @torch.no_grad()
    def same_logits(self, tuned, dense):
        expected, found = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(4, 20)[None]).logits
            for folder in (tuned, dense)
        )
        assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_norms_and_biases_are_exact(tmp_path, family, dtype):
    """Qwen2 has biases, Qwen3 norms of queries and keys."""
    base = tiny_checkpoint(tmp_path / "base", family=family, dtype=dtype)
    tuned = perturbed(base, tmp_path / "tuned")
    out, got = compressed(base, tuned, tmp_path)
    expected = Checkpoint.open(tuned)
    vectors = [name for name in expected.names if len(expected.shape(name)) == 1]
    assert any(name.endswith("bias" if family == "qwen2" else "q_norm.weight") for name in vectors)
    with Delta.open(out) as delta:
        assert all(isinstance(delta.record(name), ReplaceRecord) for name in vectors)
    for name in vectors:
        assert torch.equal(got[name], expected.tensor(name)), name
        assert got[name].dtype == dtype


def test_unchanged_norms_have_no_record_and_new_biases_do(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", family="qwen2")
    tuned = perturbed(base, tmp_path / "tuned")
    name, bias = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
    for folder, change in (
        (tuned, lambda t: t.update({name: load_file(base / "model.safetensors")[name]})),
        (base, lambda t: t.pop(bias)),
    ):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert record_of(base, tuned, "auto", name) is None
    record = record_of(base, tuned, "auto", bias)
    assert np.array_equal(record.values.to_float32(), Checkpoint.open(tuned).tensor(bias).float().numpy())


def test_auto_is_exact_beside_lossless_projections(base, tmp_path):
    tuned = perturbed(base, tmp_path / "tuned")
    recipe = Recipe(bands="16:full", ratio=1.0, group_size=GROUP)
    out = compress(base, tuned, tmp_path / "d.safetensors", CompressionOptions(recipe, "none"))
    with Delta.open(out) as delta:
        assert isinstance(delta.record(EMBEDDING), RowsRecord)
        assert [band.bits for band in delta.record("model.layers.0.self_attn.q_proj.weight").bands] == [16]
