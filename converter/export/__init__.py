# SPDX-License-Identifier: Apache-2.0
"""Hugging Face decoders as ONNX graphs whose projections carry hot-swappable fine-tunes."""

from deltaweave.converter.export.architecture import FAMILIES
from deltaweave.converter.export.errors import ExportError
from deltaweave.converter.export.export import DATA_FILE, MODEL_FILE, ExportOptions, export_decoder
from deltaweave.converter.export.manifest import GraphManifest, GraphParameter, GraphTensor

__all__ = [
    "DATA_FILE",
    "FAMILIES",
    "MODEL_FILE",
    "ExportError",
    "ExportOptions",
    "GraphManifest",
    "GraphParameter",
    "GraphTensor",
    "export_decoder",
]
