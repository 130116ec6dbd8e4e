# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from deltaweave.converter.export.manifest import GraphTensor
from deltaweave.converter.export.weights import ONNX_TYPES
from onnx import helper, numpy_helper

__all__ = ["DOMAIN", "OPSET", "GraphBuilder"]

OPSET = 24  # the first with TensorScatter
DOMAIN = "deltaweave"
# TensorRT's parser looks the plugin up by these, on every node.
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": DOMAIN}


class GraphBuilder:
    """Nodes in order; values are their names."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._count = 0

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Adds a standard node with one output, named if `outputs` names it."""
        names = list(outputs) or [self._name(op)]
        self._nodes.append(helper.make_node(op, inputs, names, name=self._name(op), **attributes))
        return names[0]

    def plugin(self, op: str, inputs: Sequence[str], count: int = 1, **attributes: Any) -> list[str]:
        """Adds a node of our domain with `count` outputs; `op` without its prefix."""
        outputs = [self._name(op) for _ in range(count)]
        name = self._name(op)
        self._nodes.append(
            helper.make_node(
                f"Deltaweave{op}", inputs, outputs, name=name, domain=DOMAIN, **PLUGIN_ATTRIBUTES, **attributes
            )
        )
        return outputs

    def constant(self, value: Any, dtype: Any) -> str:
        """A small tensor; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self._name("constant")
            self._initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def shape(self, *sizes: int) -> str:
        """A shape for Reshape: 0 keeps a dimension, -1 finds it."""
        return self.constant(sizes, np.int64)

    def cast(self, value: str, dtype: str) -> str:
        """Adds a Cast."""
        return self.node("Cast", [value], to=ONNX_TYPES[dtype])

    def initializer(self, tensor: onnx.TensorProto) -> str:
        """Adds a weight."""
        self._initializers.append(tensor)
        return str(tensor.name)

    def model(
        self, name: str, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor], producer: str
    ) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes, name, [_value(t) for t in inputs], [_value(t) for t in outputs], self._initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        return helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name=producer)

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{what}_{self._count}"


def _value(tensor: GraphTensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], tensor.shape)
