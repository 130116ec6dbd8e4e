# SPDX-License-Identifier: Apache-2.0
"""BitDelta against its definition: signs, mean magnitudes, native size, and distillation that lowers its own loss."""

import hashlib

import numpy as np
import pytest
import torch
from deltaweave.converter import (
    BitDeltaOptions,
    CalibrationError,
    Checkpoint,
    OutputError,
    Policies,
    apply,
    compress_bitdelta,
)
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import Delta, DenseRecord
from helpers import perturbed, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

EXACT = Policies("exact", "exact")
TEXT = "the quick brown fox jumps over the lazy dog, and some numbers 0123456789. " * 40
NAME = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    (folder / "text.txt").write_text(TEXT)
    return base, perturbed(base, folder / "tuned")


@pytest.fixture(scope="module")
def distilled(pair):
    """(undistilled, distilled) files and the settings of the second."""
    folder = pair[0].parent
    options = BitDeltaOptions(str(folder / "text.txt"), steps=20, batch_size=4, sequence_length=32, policies=EXACT)
    none = BitDeltaOptions("none", policies=EXACT)
    plain = compress_bitdelta(*pair, folder / "plain.safetensors", none)
    return plain, compress_bitdelta(*pair, folder / "distilled.safetensors", options), options


def true_delta(base, tuned, name):
    before, after = (Checkpoint.open(folder).tensor(name).numpy() for folder in (base, tuned))
    return after - before


def projections(delta):
    return {name: delta.record(name) for name in delta.names if name.endswith("_proj.weight")}


def test_undistilled_is_sign_times_mean_magnitude(pair, distilled):
    with Delta.open(distilled[0]) as delta:
        records = projections(delta)
        assert len(records) == 14
        for name, record in records.items():
            truth = true_delta(*pair, name)
            scale = np.abs(truth.astype(np.float64)).mean()
            got = record.dequantize()
            assert np.array_equal(got > 0, truth > 0)
            # One magnitude in the whole matrix: the mean, as far as float16 holds it.
            assert np.unique(np.abs(got)).size == 1
            assert abs(got[0, 0]) == pytest.approx(scale, rel=2**-11)
            error = np.linalg.norm(truth - got) / np.linalg.norm(truth)
            assert record.quality["weight_error"] == pytest.approx(error, rel=1e-4)


def test_a_change_of_zero_counts_as_negative(pair, tmp_path):
    """As published: +1 where the delta is positive, -1 elsewhere."""
    tuned = perturbed(pair[0], tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors[NAME][3] = load_file(pair[0] / "model.safetensors")[NAME][3]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with Delta.open(compress_bitdelta(pair[0], tuned, tmp_path / "d.safetensors", BitDeltaOptions("none"))) as delta:
        got = delta.dequantize(NAME)
    assert (got[3] < 0).all()
    assert (got[:3] > 0).any()


def test_native_size_is_one_bit_a_weight_and_one_grid(pair, distilled):
    with Delta.open(distilled[1]) as delta:
        for name, record in projections(delta).items():
            rows, columns = record.shape
            assert isinstance(record, DenseRecord)
            assert columns % 8 == 0
            (band,) = record.matrix.bands
            assert (band.codes.nbytes, band.grid.nbytes) == (rows * columns // 8, 4), name
        count = delta.byte_count()
        weights = sum(rows * columns for rows, columns in (record.shape for record in projections(delta).values()))
        assert count.codes == weights // 8
        assert count.grids == 4 * 14
        # Codes and the grid are padded to 256 bytes each, and nothing else is stored.
        padding = sum(-(rows * columns // 8) % 256 + 252 for rows, columns in shapes(delta))
        assert count.padding == padding
        assert count.projections == weights // 8 + 56 + padding


def shapes(delta):
    return [record.shape for record in projections(delta).values()]


def test_distillation_lowers_the_logit_error_on_its_data(pair, distilled, tmp_path):
    plain, better, options = distilled
    windows = options.steps * options.batch_size
    tokens = CalibrationData.load(options.calibration, pair[1], windows, options.sequence_length, options.seed).tokens
    target = logits(pair[1], tokens)
    losses = [
        float((logits(apply(pair[0], file, tmp_path / file.stem), tokens) - target).square().mean())
        for file in (plain, better)
    ]
    # Twenty steps gain 1.6 % here; scales alone have little more to give on a random model.
    assert losses[1] < 0.99 * losses[0], losses


@torch.no_grad()
def logits(folder, tokens):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def test_distillation_moves_scales_and_no_sign(distilled):
    with Delta.open(distilled[0]) as plain, Delta.open(distilled[1]) as better:
        factors = []
        for name in projections(plain):
            before, after = plain.dequantize(name), better.dequantize(name)
            assert np.array_equal(before > 0, after > 0)
            factors.append(abs(after[0, 0] / before[0, 0]))
        assert np.ptp(factors) > 0.01  # every scale finds its own value
        assert (plain.header.method["steps"], better.header.method["steps"]) == (0, 20)
        assert plain.header.calibration is None
        assert better.header.calibration["samples"] == 80
        assert better.header.method["name"] == "bitdelta"


def test_two_runs_are_byte_for_byte_equal(pair, distilled, tmp_path):
    again = compress_bitdelta(*pair, tmp_path / "again.safetensors", distilled[2])
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (distilled[1], again)]
    assert digests[0] == digests[1]


def test_biases_stay_while_scales_are_distilled(tmp_path):
    """Qwen2's projections carry biases: the student must keep the fine-tune's."""
    base = tiny_checkpoint(tmp_path / "base", family="qwen2")
    tuned = perturbed(base, tmp_path / "tuned")
    (tmp_path / "text.txt").write_text(TEXT)
    options = BitDeltaOptions(str(tmp_path / "text.txt"), steps=2, sequence_length=16)
    out = compress_bitdelta(base, tuned, tmp_path / "d.safetensors", options)
    dense = Checkpoint.open(apply(base, out, tmp_path / "dense"))
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(dense.tensor(bias), Checkpoint.open(tuned).tensor(bias))


def test_unchanged_projections_have_no_record(pair, tmp_path):
    tuned = perturbed(pair[0], tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors[NAME] = load_file(pair[0] / "model.safetensors")[NAME]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    options = BitDeltaOptions(str(tmp_path / "text.txt"), steps=2, sequence_length=16)
    with Delta.open(compress_bitdelta(pair[0], tuned, tmp_path / "d.safetensors", options)) as delta:
        assert len(projections(delta)) == 13
        assert NAME not in delta.names


def test_bad_input_leaves_nothing(pair, tmp_path):
    out = tmp_path / "d.safetensors"
    with pytest.raises(CalibrationError, match=r"gone\.txt: not readable"):
        compress_bitdelta(*pair, out, BitDeltaOptions(str(tmp_path / "gone.txt")))
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        compress_bitdelta(*pair, out, BitDeltaOptions("none"))
    assert out.read_bytes() == b"precious"
