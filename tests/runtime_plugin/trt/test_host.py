# SPDX-License-Identifier: Apache-2.0
"""The parts of the engine host that need no GPU, against the PyTorch host and Transformers."""

from __future__ import annotations

import fusion_family
import numpy as np
import pytest
import torch
from deltaweave.converter.export import ExportOptions, export_decoder
from deltaweave.formats import Delta
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.pytorch import sampling as torch_sampling
from deltaweave.runtime_plugin.pytorch.tenant import ParameterTable
from deltaweave.runtime_plugin.pytorch.tenant import load_fusion as load_torch_fusion
from deltaweave.runtime_plugin.pytorch.tenant import load_tenant as load_torch_tenant
from deltaweave.runtime_plugin.requests import Chooser, Sampling
from deltaweave.runtime_plugin.trt.builder import profiles
from deltaweave.runtime_plugin.trt.manifest import Capacities, GraphInfo
from deltaweave.runtime_plugin.trt.sampling import choose
from deltaweave.runtime_plugin.trt.tenant import load_fusion, load_tenant, rotary_frequencies
from family import Family, edit_config
from helpers import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 7, 200]),
    penalty=st.sampled_from([1.0, 1.3]),
)
@settings(deadline=None, max_examples=60)
def test_both_hosts_choose_the_same_tokens(seed, temperature, top_p, top_k, penalty):
    generator = np.random.default_rng(seed)
    logits = (3 * generator.standard_normal(97)).astype(np.float32)
    logits[90:] = -np.inf
    text = generator.integers(0, 90, 12).tolist()
    wanted = Sampling(temperature, top_p, top_k, penalty, seed)
    mine, theirs = Chooser(wanted), Chooser(wanted)
    for _ in range(5):
        expected = torch_sampling.choose(torch.from_numpy(logits)[None], [theirs], [text])
        assert [choose(logits, mine, text)] == expected


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
    ],
)
def test_rotary_frequencies_are_transformers(parameters):
    config = AutoConfig.for_model(
        "llama", hidden_size=256, num_attention_heads=4, max_position_embeddings=8192, rope_parameters=parameters
    )
    expected = LlamaRotaryEmbedding(config=config)
    found, scale = rotary_frequencies(config.rope_parameters, 64, "d")
    np.testing.assert_allclose(found, expected.inv_freq.numpy(), rtol=2e-6)
    assert scale == expected.attention_scaling


def test_other_rotary_embeddings_are_refused():
    with pytest.raises(AttachError, match=r"d: rotary embedding yarn, which differs from the base's"):
        rotary_frequencies({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, 64, "d")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tenant_is_the_pytorch_hosts(tmp_path, name):
    """The same records at the same parameters, from the manifest instead of a model."""
    family = Family.make(tmp_path, name)
    path = family.add("tuned", added_tokens=3)
    exported = export_decoder(family.base, tmp_path / "graph", ExportOptions(max_sequence=64, slots=4))
    graph = GraphInfo.model_validate_json(exported.model_dump_json())
    table = ParameterTable(family.model)
    assert [graph.table().name(i) for i in range(len(table))] == [table.name(i) for i in range(len(table))]
    assert [bytes(each) for each in graph.table().shapes()] == [bytes(each) for each in table.shapes()]
    assert graph.max_rank == table.largest_rank()
    with Delta.open(path) as delta:
        mine = load_tenant(graph, family.model.config, delta, "tuned")
        theirs = load_torch_tenant(table, delta, "tuned")
        assert [bytes(each) for each in mine.shapes] == [bytes(each) for each in theirs.shapes]
        assert mine.vocabulary == theirs.vocabulary == graph.base_vocabulary + 3
        np.testing.assert_allclose(mine.inverse_frequencies, theirs.inverse_frequencies.numpy(), rtol=2e-6)


def test_tenants_that_do_not_fit_are_refused(tmp_path):
    family = Family.make(tmp_path)
    large = family.add("large", added_tokens=9)
    tied = family.add("tied", edit=lambda folder: edit_config(folder, tie_word_embeddings=True), embeddings=False)
    exported = export_decoder(family.base, tmp_path / "graph", ExportOptions(max_sequence=64, slots=4, vocabulary=60))
    graph = GraphInfo.model_validate(exported.model_dump())
    with Delta.open(large) as delta, pytest.raises(AttachError, match=r"takes up to 60; build it with --vocabulary 65"):
        load_tenant(graph, family.model.config, delta, "large")
    with (
        Delta.open(tied) as delta,
        pytest.raises(AttachError, match=r"ties it to another parameter and the base does not"),
    ):
        load_tenant(graph, family.model.config, delta, "tied")


def test_a_fusion_is_the_pytorch_hosts(native, tmp_path):
    family = fusion_family.make(tmp_path)
    options = ExportOptions(max_sequence=64, slots=4, fusions=True, delta_experts=2)
    graph = GraphInfo.model_validate(export_decoder(family.base, tmp_path / "graph", options).model_dump())
    table = ParameterTable(family.model, gates=True)
    assert [bytes(each) for each in graph.table().shapes()] == [bytes(each) for each in table.shapes()]
    assert graph.max_rank == 512
    for name, fusion in family.fusions.items():
        mine = load_fusion(graph, family.model.config, fusion, name, tmp_path / "file")
        theirs = load_torch_fusion(table, fusion, name, tmp_path / "file")
        assert [bytes(each) for each in mine.shapes] == [bytes(each) for each in theirs.shapes]
        assert mine.experts.keys() == theirs.experts.keys()
        for place, expert in mine.experts.items():
            assert [bytes(each) for each in expert.shapes] == [bytes(each) for each in theirs.experts[place].shapes]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("three", {}, "built without them; build it with --fusions"),
        ("joined", {"fusions": True}, "none of the first may be; build it with --delta-experts 2"),
        ("deltas", {"fusions": True, "delta_experts": 1}, "1 of the first may be; build it with --delta-experts 2"),
    ],
)
def test_fusions_that_an_engine_was_not_built_for(native, tmp_path, name, options, words):
    family = fusion_family.make(tmp_path)
    exported = export_decoder(family.base, tmp_path / "graph", ExportOptions(max_sequence=64, slots=4, **options))
    graph = GraphInfo.model_validate(exported.model_dump())
    with pytest.raises(AttachError, match=words):
        load_fusion(graph, family.model.config, family.fusions[name], name, tmp_path / "file")


def test_profiles_hold_the_largest_steps(tmp_path):
    family = Family.make(tmp_path)
    exported = export_decoder(family.base, tmp_path / "graph", ExportOptions(max_sequence=64, slots=4))
    graph = GraphInfo.model_validate(exported.model_dump())
    prefill, decode = profiles(graph, Capacities(max_batch=8, max_tokens=64, arena_bytes=1 << 40))
    assert (prefill["batch"].most, prefill["tokens"].least, prefill["tokens"].most) == (1, 1, 64)
    assert (decode["batch"].most, decode["tokens"].most) == (8, 1)
    assert prefill["arena_words"].usual == (1 << 31) - 1
