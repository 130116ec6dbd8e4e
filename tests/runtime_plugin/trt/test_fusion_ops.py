# SPDX-License-Identifier: Apache-2.0
"""The ops of fusions in a graph made by hand: built ahead of time, and refused by name."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import onnx
from onnx import TensorProto, helper
from deltaweave.runtime_plugin.library import DIRECTORY_FIELDS
from deltaweave.runtime_plugin.trt.backend import load_backend
backend = load_backend()
api = backend.api
STAMP = {"domain": "deltaweave", "plugin_version": "1", "plugin_namespace": "deltaweave"}
def info(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)
def build(*, activation=TensorProto.FLOAT16, parameters=(1, 2), weights=None, expert=1):
    nodes = [
        helper.make_node("DeltaweavePlan", ["slots", "directory"], ["plan"], **STAMP),
        helper.make_node(
            "DeltaweaveGate", ["x", "slots", "arena_address", "directory"], ["weights"], parameter=0, **STAMP
        ),
        helper.make_node(
            "DeltaweaveGatedLora",
            ["x", "q", "k", "plan", "arena", "directory", weights or "weights"], ["q_lora", "k_lora"],
            parameters=list(parameters), max_rank=64, **STAMP,
        ),
        helper.make_node(
            "DeltaweaveWeighedDelta",
            ["x", "q_lora", "k_lora", "plan", "arena", "directory", weights or "weights"], ["q_out", "k_out"],
            parameters=list(parameters), max_rank=64, expert=expert, **STAMP,
        ),
    ]
    inputs = [
        info("x", activation, ["tokens", 64]), info("q", activation, ["tokens", 64]),
        info("k", activation, ["tokens", 32]), info("slots", TensorProto.INT32, ["tokens"]),
        info("arena", TensorProto.INT64, [32]), info("arena_address", TensorProto.INT64, [1]),
        info("directory", TensorProto.INT64, [3, 2, DIRECTORY_FIELDS]),
        info("narrow", TensorProto.FLOAT, ["tokens", 4]),
    ]
    outputs = [
        info("weights", TensorProto.FLOAT, ["tokens", 8]), info("q_out", activation, ["tokens", 64]),
        info("k_out", activation, ["tokens", 32]),
    ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(nodes, "fusion", [each for each in inputs if each.name in used], outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("deltaweave", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    builder = api.Builder(backend.logger(None))
    strong = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = api.OnnxParser(network, backend.logger(None))
    if not parser.parse(model.SerializeToString()):
        return backend.take_error() or parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(api.ComputeCapability.SM89, 0)
    config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    profile = builder.create_optimization_profile()
    for name, width in (("x", 64), ("q", 64), ("k", 32), ("slots", 0), ("narrow", 4)):
        if name in used:
            profile.set_shape(name, *((count, width)[: 2 if width else 1] for count in (1, 8, 32)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return backend.take_error() if plan is None else "built"
print(build())
print(build(activation=TensorProto.BFLOAT16))
print(build(parameters=(1, 3)))
print(build(weights="narrow"))
print(build(weights="x"))
print(build(expert=8))
"""


def test_ops_of_fusions_build():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    expected = [
        "built",
        "built",
        "DeltaweaveGatedLora: parameter 3, the directory has 3",
        "DeltaweaveGatedLora: weights of shape [32, 4] for 32 tokens of 8 experts",
        "DeltaweaveGatedLora: input 6 has data type 1, expected FP32",
        "DeltaweaveWeighedDelta: expert 8, expected 0 to 7",
    ]
    assert len(said) == len(expected), said
    for line, part in zip(said, expected, strict=True):
        assert part in line, said
