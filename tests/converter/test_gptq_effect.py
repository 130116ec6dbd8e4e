# SPDX-License-Identifier: Apache-2.0
"""GPTQ's effect is real: on held-out text, less output error than round-to-nearest, for every kind of projection."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))
from deltaweave.converter import Checkpoint, CompressionOptions, Recipe, compress
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.families import family_of
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import Delta
from pair import PairSettings, Stage, make_pair

LENGTH = 64
# Trained for seconds: enough for activations that are correlated as a model's are.
SETTINGS = PairSettings(
    hidden_size=128,
    intermediate_size=320,
    heads=2,
    base=Stage(steps=60, stories=16, learning_rate=2e-3),
    tuned=Stage(steps=60, stories=3, learning_rate=2e-3),
    held_out=100,
    target=0.0,
)


@pytest.mark.slow
def test_held_out_output_error_of_every_projection_kind(tmp_path):
    pair = make_pair(tmp_path / "pair", 0, SETTINGS, show_progress=False)
    recipe = Recipe.preset("triple", ratio=1 / 4)
    files = {
        "gptq": (str(pair.calibration), tmp_path / "gptq.safetensors"),
        "nearest": ("none", tmp_path / "nearest.safetensors"),
    }
    for calibration, output in files.values():
        options = CompressionOptions(recipe, calibration, samples=512, sequence_length=LENGTH)
        compress(pair.base, pair.tuned, output, options)
    errors = {name: held_out_errors(pair, output, tmp_path) for name, (_, output) in files.items()}
    assert len(errors["gptq"]) == 7
    for kind, error in errors["gptq"].items():
        assert error < errors["nearest"][kind], (kind, error, errors["nearest"][kind])


def held_out_errors(pair, path, folder):
    """Relative output error of each kind of projection on text that calibration never saw, over all layers."""
    base, tuned = Checkpoint.open(pair.base), Checkpoint.open(pair.tuned)
    tokens = CalibrationData.load(pair.text, pair.tuned, 64, LENGTH, seed=1).tokens
    stream = BlockStream(tuned, LENGTH, torch.device("cpu"))
    shape = (*tokens.shape, SETTINGS.hidden_size)
    inputs = Activations.create(folder / "held-out.bin", shape, stream.dtype, torch.device("cpu"))
    stream.embed(tokens, inputs)
    error, energy = defaultdict(float), defaultdict(float)
    with Delta.open(path) as delta:
        for layer, stages in enumerate(family_of(tuned).projections(tuned)):
            stream.load(layer)
            for projection in (projection for stage in stages for projection in stage):
                hessian = stream.second_moment(projection, inputs).double()
                change = (tuned.tensor(projection.weight).float() - base.tensor(projection.weight).float()).double()
                missed = change - torch.from_numpy(delta.dequantize(projection.weight)).double()
                error[projection.kind] += float(((missed @ hessian) * missed).sum())
                energy[projection.kind] += float(((change @ hessian) * change).sum())
                if projection.closes_half:
                    for rows, hidden in inputs.chunks():
                        inputs.write(rows, stream.through_half(layer, projection.half, hidden))
            stream.unload(layer)
    return {kind: (error[kind] / energy[kind]) ** 0.5 for kind in error}
