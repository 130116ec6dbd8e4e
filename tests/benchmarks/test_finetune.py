# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for the experiments: a step as a CUDA graph trains as the same step does."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint

from deltaweave.gates.examples import IGNORED, Example, collate
from deltaweave.gates.training import answer_loss
from deltaweave.models import load_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LONGEST, STEPS, RATE = 19, 12, 3e-3


@pytest.fixture
def finetune(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import finetune

    yield finetune
    sys.modules.pop("finetune")


def batches(seed):
    source = torch.Generator().manual_seed(seed)

    def example():
        lengths = torch.randint(3, 9, (2,), generator=source).tolist()
        return Example(*(tuple(torch.randint(3, 40, (length,), generator=source).tolist()) for length in lengths))

    whole = Example(tuple(range(3, 12)), tuple(range(3, 13)))  # as long as any
    return [[whole, *(example() for _ in range(5))] for _ in range(STEPS)]


def test_padding_changes_no_loss(tmp_path, finetune):
    model = load_checkpoint(tiny_checkpoint(tmp_path / "base"), torch.float64)
    examples = batches(0)[0][1:]
    padded = finetune._padded(examples, LONGEST)
    assert padded.tokens.shape == (5, 24)
    assert (padded.targets != IGNORED).sum() == sum(len(example.answer) for example in examples)
    assert finetune.padded_loss(model, padded).item() == pytest.approx(answer_loss(model, collate(examples, 0)).item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_graph_trains_as_its_steps_do(tmp_path, finetune):
    base = tiny_checkpoint(tmp_path / "base")
    losses = []
    for train, more in ((finetune.train, ()), (finetune.train_as_graph, (LONGEST,))):
        model = load_checkpoint(base, torch.float32).cuda()
        losses.append(train(model, batches(1), STEPS, RATE, *more))
    assert len(losses[1]) == STEPS
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)  # bfloat16 products, summed in another order
