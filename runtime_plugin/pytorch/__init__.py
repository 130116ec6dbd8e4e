# SPDX-License-Identifier: Apache-2.0
"""The PyTorch host: the reference op, and deltas on Hugging Face models."""

from deltaweave.runtime_plugin.pytorch.attach import AttachError, Attachment, attach
from deltaweave.runtime_plugin.pytorch.packed import DenseDelta, FactoredDelta, PackedRows
from deltaweave.runtime_plugin.pytorch.reference import delta_linear, delta_rows, dense_linear

__all__ = [
    "AttachError",
    "Attachment",
    "DenseDelta",
    "FactoredDelta",
    "PackedRows",
    "attach",
    "delta_linear",
    "delta_rows",
    "dense_linear",
]
