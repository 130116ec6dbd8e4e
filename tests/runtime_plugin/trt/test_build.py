# SPDX-License-Identifier: Apache-2.0
"""Engines built ahead of time without a GPU, by the command, in processes of their own."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from deltaweave.formats import BaseIdentity, DeltaweaveError
from deltaweave.runtime_plugin.trt import folder as folders
from deltaweave.runtime_plugin.trt.backend import Backend, find_plugin
from deltaweave.runtime_plugin.trt.errors import EngineError
from deltaweave.runtime_plugin.trt.folder import EngineFolder, replaced_folder
from deltaweave.runtime_plugin.trt.manifest import EngineManifest
from helpers import FAMILIES, tiny_checkpoint
from typer.testing import CliRunner

from deltaweave.cli.app import application

CAPABILITIES = ["8.0", "8.9", "12.0"]
SIZES = [
    *("--max-sequence", "128", "--max-tokens", "64", "--max-batch", "8", "--max-tenants", "4"),
    *("--arena-bytes", "8MiB"),
]
# Ops of a decoder block; biases are Qwen2's.
OPS = ["Plan", "DeltaGemm", "DenseGemm", "RmsNorm", "Embed"]


def command(*words):
    return [sys.executable, "-m", "deltaweave", *map(str, words)]


def run(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240, check=False)


def build(base, output, *words):
    return run("build", "--base", base, "-o", output, *SIZES, *words)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype=torch.float16)


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    """Built once for all three capabilities."""
    output = tmp_path_factory.mktemp("engine") / "engine"
    result = build(base, output, "--compute-capability", " ".join(CAPABILITIES), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((output / "manifest.json").read_text())
    return output


@pytest.fixture
def copied(engine, tmp_path):
    return shutil.copytree(engine, tmp_path / "engine")


def backend_of(engine, **changes):
    """The software that the manifest names, or another."""
    software = EngineManifest.read(engine).software
    known = {"name": software.backend, "version": software.backend_version}
    return Backend(api=None, plugin=find_plugin(), **{**known, **changes})


class TestEngineFolder:
    def test_holds_plans_with_our_layers(self, engine):
        opened = EngineFolder.open(engine)
        assert sorted(opened.manifest.plans) == sorted(CAPABILITIES)
        contents = {each: opened.plan(each, backend_of(engine)) for each in CAPABILITIES}
        assert len(set(contents.values())) == 3
        for plan in contents.values():
            for name in OPS:
                assert f"Deltaweave{name}".encode() in plan

    def test_manifest_says_what_it_was_built_for(self, engine, base):
        manifest = EngineFolder.open(engine).manifest
        assert (manifest.capacities.max_batch, manifest.capacities.max_tokens) == (8, 64)
        assert manifest.capacities.arena_bytes == 8 << 20
        graph = manifest.graph
        assert (graph.dtype, graph.max_sequence, graph.slots, graph.layers) == ("float16", 128, 4, 2)
        assert graph.cache_bytes(8) == 8 * 2 * 2 * 2 * 128 * 16 * 2
        assert manifest.software.backend == "tensorrt_rtx"
        assert len(manifest.software.plugin_sha256) == 64
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {each.name for each in engine.iterdir()}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("family", FAMILIES[1:])
    @pytest.mark.slow
    def test_every_family_builds(self, tmp_path, family, dtype):
        base = tiny_checkpoint(tmp_path / "base", family, dtype=torch.bfloat16)
        result = build(base, tmp_path / "engine", "--compute-capability", "8.9", "--dtype", dtype)
        assert result.returncode == 0, result.stderr
        assert "KV cache: 262 kB for 8 rows of 128 tokens" in result.stdout
        plan = (tmp_path / "engine" / "sm89.plan").read_bytes()
        assert (b"DeltaweaveAddBias" in plan) == (family == "qwen2")

    def test_fusions_are_built_where_asked_for(self, engine, base, tmp_path):
        result = build(
            base, tmp_path / "engine", "--compute-capability", "8.9", "--fusions", "--delta-experts", "1", "--json"
        )
        assert result.returncode == 0, result.stderr
        graph = json.loads(result.stdout)["graph"]
        assert (graph["fusions"], graph["delta_experts"], graph["max_rank"]) == (True, 1, 512)
        plan, plain = ((each / "sm89.plan").read_bytes() for each in (tmp_path / "engine", engine))
        for name in ("Gate", "GatedLora", "WeighedDelta"):
            assert f"Deltaweave{name}".encode() in plan
            assert f"Deltaweave{name}".encode() not in plain
        refused = build(base, tmp_path / "other", "--compute-capability", "8.9", "--delta-experts", "1")
        assert refused.returncode == 2
        assert "delta_experts 1, expected 0 to 8, and fusions where there are some" in refused.stderr

    def test_an_older_engine_is_replaced_and_other_folders_are_not(self, copied, base, tmp_path):
        before = (copied / "manifest.json").read_bytes()
        result = build(base, copied, "--compute-capability", "8.9", "--max-batch", "2")
        assert result.returncode == 0, result.stderr
        assert (copied / "manifest.json").read_bytes() != before
        assert sorted(EngineFolder.open(copied).manifest.plans) == ["8.9"]
        assert not (copied / "sm80.plan").exists()
        other = tmp_path / "mine"
        other.mkdir()
        (other / "letter.txt").write_text("dear")
        with pytest.raises(EngineError, match=r"is there already and no engine folder"), replaced_folder(other):
            pytest.fail("not reached")
        assert (other / "letter.txt").read_text() == "dear"


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--compute-capability", "9.0"], "compute capability 9.0: tensorrt_rtx"),
            (["--compute-capability", "8.9,8.9"], "expected each once"),
            (["--compute-capability", "8.9", "--dtype", "int8"], "expected float16 or bfloat16"),
            (["--compute-capability", "8.9", "--arena-bytes", "much"], "--arena-bytes 'much'"),
            (["--compute-capability", "8.9", "--max-batch", "4000"], "max_batch 4000, expected 1 to 2048"),
        ],
    )
    def test_options(self, base, tmp_path, words, message):
        words = ["build", "--base", str(base), "-o", str(tmp_path / "engine"), *SIZES, *words]
        result = CliRunner().invoke(application(), words)
        assert result.exit_code
        said = str(result.exception) if isinstance(result.exception, DeltaweaveError) else result.output
        assert message in " ".join(said.replace("│", " ").split())
        assert list(tmp_path.iterdir()) == []

    def test_another_version_capability_or_plugin(self, engine, monkeypatch):
        opened = EngineFolder.open(engine)
        with pytest.raises(EngineError, match=r"no plan for compute capability 9\.0, there are 12\.0, 8\.0, 8\.9"):
            opened.plan("9.0", backend_of(engine))
        with pytest.raises(EngineError, match=r"this is tensorrt_rtx 1\.2\.3; build it again"):
            opened.plan("8.9", backend_of(engine, version="1.2.3"))
        with pytest.raises(EngineError, match=r"this is tensorrt 10\.1; build it again"):
            opened.plan("8.9", backend_of(engine, name="tensorrt", version="10.1"))
        monkeypatch.setattr(folders, "PLUGIN_VERSION", "2")
        with pytest.raises(EngineError, match=r"built for plugin version 1, this is 2"):
            opened.plan("8.9", backend_of(engine))

    def test_another_base(self, engine):
        opened = EngineFolder.open(engine)
        own = opened.manifest.base
        opened.require_base(BaseIdentity("same", None, None, own.root, own.fingerprint, {}), "d.safetensors")
        with pytest.raises(EngineError, match=r"d\.safetensors: made from base other"):
            opened.require_base(BaseIdentity("other", None, None, "1" * 64, "2" * 64, {}), "d.safetensors")

    def test_damage(self, copied):
        plan = copied / "sm89.plan"
        content = plan.read_bytes()
        plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(EngineError, match=r"sm89\.plan: its SHA-256 is not the manifest's"):
            EngineFolder.open(copied).plan("8.9", backend_of(copied))
        plan.write_bytes(content[:-1])
        with pytest.raises(EngineError, match=r"sm89\.plan: has \d+ bytes, the manifest says"):
            EngineFolder.open(copied)
        plan.unlink()
        with pytest.raises(EngineError, match=r"sm89\.plan: is missing"):
            EngineFolder.open(copied)
        manifest = copied / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
        with pytest.raises(EngineError, match=r"manifest\.json: format: "):
            EngineFolder.open(copied)
        manifest.write_text("{")
        with pytest.raises(EngineError, match=r"manifest\.json: the file: "):
            EngineFolder.open(copied)
        manifest.unlink()
        with pytest.raises(EngineError, match=r"no manifest\.json, so this is no engine folder"):
            EngineFolder.open(copied)

    def test_running_needs_a_gpu(self, engine):
        if torch.cuda.is_available():
            pytest.skip("there is one")
        result = run("generate", "--engine", engine, "--prompt", "base=abc")
        assert result.returncode == 2
        assert "an engine needs an NVIDIA GPU" in " ".join(result.stderr.split())


@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_build_leaves_nothing_that_looks_whole(base, tmp_path, kind):
    output = tmp_path / "engine"
    words = command("build", "--base", base, "-o", output, *SIZES, "--compute-capability", "8.0 8.9 12.0")
    # A shell's background job ignores SIGINT, and so would what it starts.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)
    partial = tmp_path / "engine.partial"
    deadline = time.monotonic() + 120
    while not (partial / "sm80.plan").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(kind)
    process.wait(60)
    assert not output.exists()
    assert not (partial / "manifest.json").exists()
    if partial.exists():
        with pytest.raises(EngineError):
            EngineFolder.open(partial)
    result = build(base, output, "--compute-capability", "8.9")
    assert result.returncode == 0, result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["engine"]


FIELDS = """
import sys
from deltaweave.runtime_plugin.trt.backend import load_backend
import numpy as np
backend = load_backend()
trt = backend.api
creators = {creator.name: creator for creator in trt.get_plugin_registry().all_creators}
def make(name, **values):
    fields = [trt.PluginField(field, value, kind) for field, (value, kind) in values.items()]
    creator = creators["Deltaweave" + name]
    made = creator.create_plugin("x", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    return made, backend.take_error()
types = trt.PluginFieldType
integers = lambda *values: (np.array(values, np.int32), types.INT32)
numbers = lambda *values: (np.array(values, np.float32), types.FLOAT32)
cases = [
    make("DeltaGemm", parameters=integers(1, 2), max_rank=integers(64)),
    make("DeltaGemm", parameters=integers(1, 2)),
    make("DeltaGemm", parameters=numbers(1.0), max_rank=integers(64)),
    make("DeltaGemm", parameters=integers(-1), max_rank=integers(64)),
    make("DeltaGemm", parameters=integers(1), max_rank=integers(64, 65)),
    make("RmsNorm", parameter=integers(1), epsilon=integers(1)),
    make("RmsNorm", parameter=integers(1), epsilon=numbers(1e-5)),
]
for made, message in cases:
    print("made" if made else "none", message, sep="|")
"""


def test_fields_are_checked():
    result = subprocess.run([sys.executable, "-c", FIELDS], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "made|",
        "none|deltaweave: DeltaweaveDeltaGemm: field max_rank is missing",
        "none|deltaweave: DeltaweaveDeltaGemm: field parameters has type 1, expected INT32 or INT64",
        "none|deltaweave: DeltaweaveDeltaGemm: field parameters holds -1, expected 0 to 2147483647",
        "none|deltaweave: DeltaweaveDeltaGemm: field max_rank has 2 values, expected one",
        "none|deltaweave: DeltaweaveRmsNorm: field epsilon has type 5, expected FLOAT32 or FLOAT64",
        "made|",
    ]


GRAPHS = """
import sys
from pathlib import Path
import onnx
from deltaweave.converter.export import ExportOptions, export_decoder
from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.trt.backend import load_backend
from deltaweave.runtime_plugin.trt.builder import build_plan
from deltaweave.runtime_plugin.trt.manifest import Capacities, GraphInfo
base, folder = sys.argv[1:]
graph = GraphInfo.model_validate(export_decoder(base, folder, ExportOptions(max_sequence=64, slots=4)).model_dump())
path = Path(folder) / "model.onnx"
content = path.read_bytes()
sizes = Capacities(max_batch=2, max_tokens=8, arena_bytes=1 << 20)
def node(model, op):
    return next(node for node in model.graph.node if node.op_type == op)
def unknown_parameter(model):
    next(each for each in node(model, "DeltaweaveDeltaGemm").attribute if each.name == "parameters").ints[0] = 999
def no_epsilon(model):
    attributes = node(model, "DeltaweaveRmsNorm").attribute
    attributes.remove(next(each for each in attributes if each.name == "epsilon"))
def plan_as_slots(model):
    node(model, "DeltaweaveEmbed").input[2] = node(model, "DeltaweavePlan").output[0]
def float_activations(model):
    norm = node(model, "DeltaweaveRmsNorm")
    place = list(model.graph.node).index(norm)
    cast = onnx.helper.make_node("Cast", [norm.input[0]], ["widened"], to=onnx.TensorProto.FLOAT)
    norm.input[0] = "widened"
    model.graph.node.insert(place, cast)
for edit in (unknown_parameter, no_epsilon, plan_as_slots, float_activations):
    model = onnx.load_model_from_string(content)
    edit(model)
    path.write_bytes(model.SerializeToString())
    try:
        build_plan(load_backend(), path, graph, sizes, capability="8.9")
        print("built")
    except DeltaweaveError as error:
        print(error)
"""


def test_graphs_that_do_not_fit_are_errors_with_our_message(base, tmp_path):
    words = [sys.executable, "-c", GRAPHS, str(base), str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    expected = [
        "DeltaweaveDeltaGemm: parameter 999, the directory has 21",
        "DeltaweaveRmsNorm: field epsilon is missing",
        "DeltaweaveEmbed: ids of shape [1, 8] for",
        "DeltaweaveRmsNorm: input 0 has data type 0",
    ]
    assert len(said) == len(expected), said
    for line, part in zip(said, expected, strict=True):
        assert part in line, said
