# SPDX-License-Identifier: Apache-2.0
"""What a compression will do, settled before it starts: options, the pair, and the bands of every projection."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.calibration import source_digest
from deltaweave.converter.checkpoint import Checkpoint
from deltaweave.converter.errors import CheckpointError, RecipeError
from deltaweave.converter.families import Projection, family_of
from deltaweave.converter.policies import Policies
from deltaweave.converter.recipe import BandPlan, Recipe
from deltaweave.formats import Band, factored_bytes

__all__ = [
    "NO_CALIBRATION",
    "CompressionOptions",
    "CompressionPlan",
    "Progress",
    "open_pair",
    "plan_compression",
    "resume_key",
    "silent",
]

Progress = Callable[[str, float, float], None]
"""Called with (what is being done, work done, work in all)."""

NO_CALIBRATION = "none"


def silent(description: str, done: float, total: float) -> None:
    """No progress."""


@dataclass(frozen=True)
class CompressionOptions:
    """Everything beside the two checkpoints that decides the output's bytes.

    Attributes:
        recipe: bands, ratio, groups, GPTQ settings.
        calibration: `default`, a .txt or .jsonl file, or `none` to round to nearest without data.
        samples: calibration sequences; 128 as published.
        sequence_length: tokens each; None takes 2048 as published, or the model's longest if shorter.
        seed: of the windows drawn from the calibration text.
        policies: embeddings and lm_head; beside full-rank 16-bit projections `auto` means `exact`.
        device: where the arithmetic runs; None takes the GPU if there is one.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe.preset("triple"))
    calibration: str = "default"
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    policies: Policies = field(default_factory=Policies)
    device: str | None = None

    @property
    def torch_device(self) -> torch.device:
        """The device that will be used."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def effective_policies(self) -> Policies:
        """The policies with `auto` settled where the recipe settles it."""
        return self.policies.exactly() if self.recipe.lossless else self.policies

    @property
    def calibrated(self) -> bool:
        """Whether GPTQ runs, rather than round-to-nearest."""
        return self.calibration != NO_CALIBRATION


@dataclass(frozen=True)
class CompressionPlan:
    """The pair and what will become of each projection, known before any work starts."""

    base: Checkpoint
    tuned: Checkpoint
    layers: list[list[list[Projection]]]
    bands: dict[str, BandPlan]

    @property
    def projections(self) -> list[Projection]:
        """All projections in order."""
        return [projection for layer in self.layers for stage in layer for projection in stage]

    @property
    def others(self) -> list[str]:
        """Tuned tensors that are not projections, aliases of tied weights left out."""
        projections = {projection.weight for projection in self.projections}
        return [name for name in self.tuned.names if name not in projections and name not in self.tuned.tied]

    @property
    def shrunk(self) -> list[Projection]:
        """Projections whose fixed bands had to shrink to meet the ratio."""
        return [projection for projection in self.projections if self.bands[projection.weight].shrunk]


def plan_compression(base: str | Path, tuned: str | Path, recipe: Recipe) -> CompressionPlan:
    """Opens and compares the pair and solves the bands of every projection.

    Raises:
        CheckpointError: a broken checkpoint, an unsupported architecture, or shapes that do not match.
        RecipeError: a ratio that no rank meets.
    """
    pair = open_pair(base, tuned)
    if recipe.allocated:
        _require_room(pair, recipe)
    return replace(pair, bands={p.weight: recipe.plan(p.kind, p.shape) for p in pair.projections})


def _require_room(pair: CompressionPlan, recipe: Recipe) -> None:
    """Refuses a common budget that not one singular vector fits, before anything is measured."""
    budget = recipe.ratio * sum(2 * p.shape[0] * p.shape[1] for p in pair.projections)
    band = Band(min(recipe.widths), 1)
    need = min(factored_bytes(p.shape, (band,), recipe.group_size).total for p in pair.projections)
    if need > budget:
        raise RecipeError(
            f"ratio {recipe.ratio:g}: all projections together have a budget of {int(budget)} bytes, and rank 1 at "
            f"{band.bits} bits takes {need}"
        )


def open_pair(base: str | Path, tuned: str | Path) -> CompressionPlan:
    """Opens and compares the pair, without bands.

    Raises:
        CheckpointError: as `plan_compression`.
    """
    base_checkpoint, tuned_checkpoint = Checkpoint.open(base), Checkpoint.open(tuned)
    family_of(base_checkpoint)
    layers = family_of(tuned_checkpoint).projections(tuned_checkpoint)
    pair = CompressionPlan(base_checkpoint, tuned_checkpoint, layers, {})
    for projection in pair.projections:
        _require_same_shape(base_checkpoint, tuned_checkpoint, projection)
    return pair


def _require_same_shape(base: Checkpoint, tuned: Checkpoint, projection: Projection) -> None:
    if projection.weight not in base:
        raise CheckpointError(f"{base.folder}: has no tensor {projection.weight}, which {tuned.folder} has")
    shape = base.shape(projection.weight)
    if shape != projection.shape:
        raise CheckpointError(
            f"{projection.weight}: {base.folder} has shape {list(shape)}, {tuned.folder} has {list(projection.shape)}"
        )


def resume_key(plan: CompressionPlan, options: CompressionOptions) -> dict[str, Any]:
    """What must agree for unfinished work to be continued: options, inputs, and what decides rounding."""
    return {
        "base": plan.base.fingerprint(),
        "tuned": plan.tuned.fingerprint(),
        "recipe": options.recipe.model_dump(mode="json"),
        "calibration": options.calibration,
        "calibration_text": source_digest(options.calibration) if options.calibrated else None,
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "seed": options.seed,
        "embeddings": options.policies.embeddings,
        "lm_head": options.policies.lm_head,
        "device": options.torch_device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
