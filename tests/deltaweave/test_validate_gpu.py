# SPDX-License-Identifier: Apache-2.0
"""`validate` where it matters: the kernels in the PyTorch host, and a TensorRT engine, held against the fine-tune."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from family import finetune
from helpers import tiny_checkpoint

from deltaweave.validation import Thresholds, validate

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

PROMPTS = ["the quick brown fox", "12+34=", "a lazy dog jumps over"]
NAMES = ("kl", "worst_kl", "logit_error", "perplexity_ratio")
FLIPS = 0.06  # of top1: four tokens of 67 whose two most likely next tokens are all but equal


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder of a tiny pair and its delta, and what `validate` is told of them."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float16, hidden=128)
    finetune(base, folder)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return folder, {"tuned": folder / "tuned", "prompts": folder / "prompts.jsonl", "max_new_tokens": 8}


def test_the_kernels_compute_what_the_reference_op_does(pair):
    folder, settings = pair
    delta = folder / "delta.safetensors"
    plain, served = (validate(delta, base=folder / "base", host=host, **settings) for host in ("attach", "arena"))
    for reference in ("float16", "float32"):
        for name in (*NAMES, "layer_error"):
            expected = plain.metrics(reference)[name]
            assert served.metrics(reference)[name] == pytest.approx(expected, rel=0.05, abs=2e-3), (reference, name)
        assert abs(served.metrics(reference)["top1"] - plain.metrics(reference)["top1"]) < FLIPS


@pytest.mark.skipif(
    not any(find_spec(name) for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")), reason="needs TensorRT"
)
def test_an_engine_is_what_the_pytorch_host_is(pair, tmp_path):
    from deltaweave.engines import EngineOptions, build_engine

    folder, settings = pair
    options = EngineOptions(
        dtype="float16", max_batch=4, max_tokens=32, max_sequence=128, max_tenants=2, arena_bytes=16 << 20
    )
    build_engine(folder / "base", tmp_path / "engine", options)
    delta = folder / "delta.safetensors"
    plain = validate(delta, base=folder / "base", references=["float16"], **settings).metrics("float16")
    limits = {name: 1.1 * plain[name] + 2e-3 for name in NAMES} | {"top1": plain["top1"] - FLIPS}
    thresholds = Thresholds.model_validate({"float16": limits})
    validation = validate(delta, engine=tmp_path / "engine", thresholds=thresholds, **settings)
    assert validation.passed, validation.broken
    for name in NAMES:
        assert validation.metrics("float16")[name] == pytest.approx(plain[name], rel=0.1, abs=2e-3), name
