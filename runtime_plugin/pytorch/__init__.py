# SPDX-License-Identifier: Apache-2.0
"""The PyTorch host: the reference op, and deltas on Hugging Face models."""

from deltaweave.runtime_plugin.pytorch.attach import AttachError, Attachment, attach
from deltaweave.runtime_plugin.pytorch.reference import DenseDelta, FactoredDelta, PackedRows, delta_linear, dense_linear

__all__ = [
    "AttachError",
    "Attachment",
    "DenseDelta",
    "FactoredDelta",
    "PackedRows",
    "attach",
    "delta_linear",
    "dense_linear",
]
