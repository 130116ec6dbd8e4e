# SPDX-License-Identifier: Apache-2.0
"""The exported graph computes what each fine-tune computes alone."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys

import fusion_family
import numpy as np
import onnx
import pytest
import torch
from deltaweave.converter import Checkpoint, CheckpointError
from deltaweave.converter.export import DATA_FILE, MODEL_FILE, ExportError, ExportOptions, export_decoder
from deltaweave.runtime_plugin.pytorch.tenant import ParameterTable
from exported_graph import ExportedGraph
from family import Family, edit_config, load
from helpers import FAMILIES, tiny_checkpoint
from safetensors.torch import load_file, save_file

OPTIONS = {"max_sequence": 48, "slots": 4}
PROMPTS = [list(range(5, 14)), list(range(30, 35)), list(range(11, 27)), list(range(40, 46))]


def check(family, tmp_path, *, dtype="float32", tolerance=1e-4, tenants=(None, "one", "two", "one"), steps=3):
    """Prefill of unequal prompts and decode steps, the rows of different tenants, against each text alone."""
    manifest = export_decoder(family.base, tmp_path / "graph", ExportOptions(dtype=dtype, **OPTIONS))
    onnx.checker.check_model(str(tmp_path / "graph" / MODEL_FILE))
    graph = ExportedGraph(tmp_path / "graph", manifest, family.arena(), tenants)
    check_steps(graph, tenants, family.alone, tolerance, steps)
    return manifest


def check_steps(graph, tenants, alone, tolerance=1e-4, steps=3):
    """`alone` gives a tenant's logits of a text by itself."""
    texts = [list(prompt) for prompt in itertools.islice(itertools.cycle(PROMPTS), len(tenants))]
    fed = texts
    for _ in range(steps):
        tokens, logits = graph.step(fed)
        for row, (tenant, text) in enumerate(zip(tenants, texts, strict=True)):
            expected = alone(tenant, torch.tensor([text]))[0, -1].numpy()
            known = len(expected)
            error = np.linalg.norm(logits[row, :known] - expected) / np.linalg.norm(expected)
            assert error < tolerance, f"{tenant} after {len(text)} tokens: {error}"
            assert (logits[row, known:] == -np.inf).all()
            assert tokens[row] == logits[row].argmax()
        fed = [[int(token)] for token in tokens]
        texts = [[*text, *new] for text, new in zip(texts, fed, strict=True)]


@pytest.fixture
def family(tmp_path):
    made = Family.make(tmp_path)
    made.add("one", seed=1)
    made.add("two", seed=2, embeddings=False)
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_families(native, tmp_path, name, tied):
    made = Family.make(tmp_path, name, tied=tied)
    made.add("one", seed=1)
    made.add("two", seed=2, added_tokens=3)
    manifest = check(made, tmp_path)
    assert manifest.tied == tied
    table = ParameterTable(made.model)
    assert [(p.name, p.shape, p.rows) for p in manifest.parameters] == [
        (table.name(i), table[table.name(i)].shape, table[table.name(i)].rows) for i in range(len(table))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_fusions(native, tmp_path, name):
    """Gates of 2 to 8 experts, LoRAs of unequal ranks on some layers, deltas as experts, fine-tunes and the base."""
    made = fusion_family.make(tmp_path, name)
    options = ExportOptions(dtype="float32", max_sequence=48, slots=16, fusions=True, delta_experts=2)
    manifest = export_decoder(made.base, tmp_path / "graph", options)
    onnx.checker.check_model(str(tmp_path / "graph" / MODEL_FILE))
    assert [p.kind for p in manifest.parameters].count("gate") == manifest.layers
    tenants = ["three", None, "joined", "one", "eight", "fixed", "two", "deltas"]
    graph = ExportedGraph(tmp_path / "graph", manifest, fusion_family.filled(made), tenants)
    check_steps(graph, tenants, functools.partial(fusion_family.alone, made), tolerance=2e-3, steps=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 8e-2)])
def test_sixteen_bits(native, family, tmp_path, dtype, tolerance):
    check(family, tmp_path, dtype=dtype, tolerance=tolerance, steps=2)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"sliding_window": 6}),  # which Transformers ignores
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("mistral", {"sliding_window": 6}),
        ("qwen3", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_settings(native, tmp_path, name, config):
    for rope in filter(None, [config.get("rope_parameters")]):
        rope["rope_theta"] = 1e4
    made = Family.make(tmp_path, name, config=config)
    made.add("one", seed=1)
    check(made, tmp_path, tenants=(None, "one"))


def test_a_rotary_embedding_of_the_tenants_own(native, family, tmp_path):
    scaled = {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}
    family.add("scaled", edit=lambda folder: edit_config(folder, rope_parameters=scaled))
    check(family, tmp_path, tenants=("scaled", None, "one"))


def test_biases_everywhere(native, tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    edit_config(base, attention_bias=True, mlp_bias=True)
    tensors = load_file(base / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name])) / 4
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    made = Family(tmp_path, load(base))
    made.add("one", seed=1)
    check(made, tmp_path, tenants=(None, "one"))


def test_weights_are_streamed_and_mapped(native, family, tmp_path):
    seen = []
    export_decoder(family.base, tmp_path / "graph", ExportOptions(**OPTIONS), lambda *counts: seen.append(counts))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1)), "progress ends at the total"
    model = onnx.load(str(tmp_path / "graph" / MODEL_FILE), load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert len(places) == seen[0][1]
    assert all(int(place["offset"]) % 4096 == 0 and place["location"] == DATA_FILE for place in places)
    assert sorted(path.name for path in (tmp_path / "graph").iterdir()) == [MODEL_FILE, DATA_FILE]
    assert (tmp_path / "graph" / MODEL_FILE).stat().st_size < 200_000


def test_every_op_says_which_plugin(native, family, tmp_path):
    export_decoder(family.base, tmp_path / "graph", ExportOptions(**OPTIONS))
    model = onnx.load(str(tmp_path / "graph" / MODEL_FILE), load_external_data=False)
    ours = [node for node in model.graph.node if node.domain == "deltaweave"]
    assert {node.op_type for node in ours} == {
        f"Deltaweave{name}" for name in ("Plan", "DeltaGemm", "DenseGemm", "RmsNorm", "Embed")
    }
    for node in ours:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_version"], attributes["plugin_namespace"]) == (b"1", b"deltaweave")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "model_type gemma, expected one of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act gelu, expected silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary embedding dynamic"),
    ],
)
def test_what_the_graph_cannot_express(tmp_path, change, words):
    base = tiny_checkpoint(tmp_path / "base")
    edit_config(base, **change)
    with pytest.raises(ExportError, match=words):
        export_decoder(base, tmp_path / "graph", ExportOptions(**OPTIONS))
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms_norm_eps": "x"}, "config.json: not usable"),
        ({"vocab_size": 40}, r"embed_tokens\.weight has shape \[56, 64\], config\.json says \[40, 64\]"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \[32, 64\], config\.json says \[64, 64\]"),
    ],
)
def test_a_configuration_that_the_tensors_deny(tmp_path, change, words):
    base = tiny_checkpoint(tmp_path / "base")
    edit_config(base, **change)
    with pytest.raises(CheckpointError, match=words):
        export_decoder(base, tmp_path / "graph", ExportOptions(**OPTIONS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8', expected one of float16, bfloat16, float32"),
        ({"max_sequence": 0}, "max_sequence 0, expected 1 to"),
        ({"slots": 10**6}, "slots 1000000, expected 1 to 4096"),
        ({"vocabulary": 3}, "vocabulary 3, the base has"),
        ({"max_rank": 5000}, "max_rank 5000, expected 1 to 4096"),
    ],
)
def test_options(tmp_path, options, words):
    base = tiny_checkpoint(tmp_path / "base")
    with pytest.raises(ExportError, match=words):
        export_decoder(base, tmp_path / "graph", ExportOptions(**{**OPTIONS, **options}))


def test_values_that_float16_cannot_hold(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight in float16 has 1 NaN or infinite"):
        export_decoder(base, tmp_path / "graph", ExportOptions(**OPTIONS))
    assert list((tmp_path / "graph").iterdir()) == [], "nothing half-written"
    export_decoder(base, tmp_path / "graph", ExportOptions(dtype="bfloat16", **OPTIONS))


def test_a_missing_tensor(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.1\.self_attn\.o_proj\.weight"):
        export_decoder(Checkpoint.open(base), tmp_path / "graph", ExportOptions(**OPTIONS))


KILLED = """
import os, signal, sys
from deltaweave.converter.export import ExportOptions, export_decoder
def stop(done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
export_decoder(sys.argv[1], sys.argv[2], ExportOptions(max_sequence=48, slots=4), stop)
"""


def test_a_killed_export_leaves_an_earlier_one_or_none(tmp_path):
    base, folder = tiny_checkpoint(tmp_path / "base"), tmp_path / "graph"
    for earlier in (None, "kept"):
        if earlier:
            folder.mkdir(exist_ok=True)
            (folder / MODEL_FILE).write_text(earlier)
        ended = subprocess.run([sys.executable, "-c", KILLED, base, folder], env=dict(os.environ), check=False)
        assert ended.returncode == -signal.SIGKILL
        assert (folder / MODEL_FILE).exists() == bool(earlier)
    export_decoder(base, folder, ExportOptions(**OPTIONS))
    assert sorted(path.name for path in folder.iterdir()) == [MODEL_FILE, DATA_FILE], "leftovers are gone"


def test_the_manifest_survives_json(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    manifest = export_decoder(base, tmp_path / "graph", ExportOptions(**OPTIONS))
    assert type(manifest).model_validate(json.loads(manifest.model_dump_json())) == manifest
