# SPDX-License-Identifier: Apache-2.0
"""The PyTorch host: custom ops and their reference, deltas on Hugging Face models, and many of them in one batch."""

from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.pytorch.arena import Arena, ArenaError
from deltaweave.runtime_plugin.pytorch.attach import attach
from deltaweave.runtime_plugin.pytorch.decode import Decoder
from deltaweave.runtime_plugin.pytorch.ops import OpError
from deltaweave.runtime_plugin.pytorch.packed import DenseDelta, FactoredDelta, PackedRows
from deltaweave.runtime_plugin.pytorch.reference import delta_linear, delta_rows, dense_linear
from deltaweave.runtime_plugin.pytorch.serve import ServingAttachment
from deltaweave.runtime_plugin.pytorch.swaps import Attachment
from deltaweave.runtime_plugin.pytorch.tenant import Tenant
from deltaweave.runtime_plugin.requests import Completion, Request, Sampling

__all__ = [
    "Arena",
    "ArenaError",
    "AttachError",
    "Attachment",
    "Completion",
    "Decoder",
    "DenseDelta",
    "FactoredDelta",
    "OpError",
    "PackedRows",
    "Request",
    "Sampling",
    "ServingAttachment",
    "Tenant",
    "attach",
    "delta_linear",
    "delta_rows",
    "dense_linear",
]
