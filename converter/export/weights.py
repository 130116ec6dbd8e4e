# SPDX-License-Identifier: Apache-2.0
"""A graph's weights in one file beside it, written as they are asked for: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from deltaweave.converter.checkpoint import Checkpoint, require_finite
from deltaweave.converter.export.manifest import Dtype

__all__ = ["ONNX_TYPES", "WeightFile"]

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ONNX_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
}
ALIGNMENT = 4096  # of a tensor's first byte: readers map the file


class WeightFile:
    """Initializers whose values lie in a file."""

    def __init__(self, file: BinaryIO, location: str, dtype: Dtype, progress: Callable[[int], None]) -> None:
        """Writes to an open file.

        Args:
            file: empty.
            location: what the graph shall call it, relative to itself.
            dtype: of all weights.
            progress: called with the number of tensors written.
        """
        self._file, self._location, self._dtype, self._progress = file, location, dtype, progress
        self._count = 0

    def add(self, checkpoint: Checkpoint, name: str, *, transposed: bool = False) -> onnx.TensorProto:
        """Writes one of the checkpoint's tensors; the initializer that refers to it.

        Raises:
            CheckpointError: values that are not finite, in the checkpoint or in the graph's dtype.
        """
        where = Path(checkpoint.files[name])
        stored = require_finite(checkpoint.tensor(name), name, where)
        tensor = stored.to(TORCH_DTYPES[self._dtype])
        if self._dtype == "float16" and stored.dtype != torch.float16:
            require_finite(tensor, f"{name} in float16", where)
        return self._write(name, tensor.T.contiguous() if transposed else tensor.contiguous())

    def _write(self, name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        start = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(start)
        data = tensor.view(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        proto = onnx.TensorProto(name=name, dims=list(tensor.shape), data_type=ONNX_TYPES[self._dtype])
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", start), ("length", data.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self._count += 1
        self._progress(self._count)
        return proto
