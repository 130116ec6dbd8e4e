# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to deltas, and back."""

from deltaweave.converter.apply import (
    apply,
    require_base,
    require_identity,
    tuned_names,
    tuned_tensor,
    write_side_files,
)
from deltaweave.converter.bitdelta import BitDeltaOptions, compress_bitdelta
from deltaweave.converter.checkpoint import Checkpoint
from deltaweave.converter.compress import compress
from deltaweave.converter.errors import (
    CalibrationError,
    CheckpointError,
    OutputError,
    RecipeError,
    ResumeError,
)
from deltaweave.converter.estimate import Estimate, estimate
from deltaweave.converter.plan import (
    CompressionOptions,
    CompressionPlan,
    Progress,
    plan_compression,
)
from deltaweave.converter.policies import EmbeddingPolicy, Policies
from deltaweave.converter.recipe import DEFAULT_RECIPE, PRESETS, Recipe
from deltaweave.converter.search import ROUNDS
from deltaweave.converter.verify import Check, verify

__all__ = [
    "DEFAULT_RECIPE",
    "PRESETS",
    "ROUNDS",
    "BitDeltaOptions",
    "CalibrationError",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "CompressionOptions",
    "CompressionPlan",
    "EmbeddingPolicy",
    "Estimate",
    "OutputError",
    "Policies",
    "Progress",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "apply",
    "compress",
    "compress_bitdelta",
    "estimate",
    "plan_compression",
    "require_base",
    "require_identity",
    "tuned_names",
    "tuned_tensor",
    "verify",
    "write_side_files",
]
