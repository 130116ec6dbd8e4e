# SPDX-License-Identifier: Apache-2.0
"""What a compression will do, settled before it starts: options, the pair, and the bands of every projection."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.checkpoint import Checkpoint, require_finite
from deltaweave.converter.errors import CheckpointError, RecipeError
from deltaweave.converter.families import Projection, family_of
from deltaweave.converter.policies import Policies
from deltaweave.converter.recipe import DEFAULT_RECIPE, BandPlan, Recipe
from deltaweave.converter.text import source_digest
from deltaweave.formats import Band, factored_bytes

__all__ = [
    "NO_CALIBRATION",
    "CompressionOptions",
    "CompressionPlan",
    "Pair",
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
        held_out: a .txt or .jsonl file that a quality is measured on; None takes an eighth of the calibration text,
            which is then not calibrated on, or the text that ships with the tool where nothing is calibrated.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe.preset(DEFAULT_RECIPE))
    calibration: str = "default"
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    policies: Policies = field(default_factory=Policies)
    device: str | None = None
    held_out: str | None = None

    def __post_init__(self) -> None:
        if self.held_out is not None and self.recipe.max_kl is None:
            raise RecipeError(f"held_out {self.held_out}: is measured on only where the recipe has a max_kl")

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
class Pair:
    """Two checkpoints that belong together.

    Attributes:
        base: the base.
        tuned: its fine-tune.
        layers: the projections as [layer][stage][position].
    """

    base: Checkpoint
    tuned: Checkpoint
    layers: list[list[list[Projection]]]

    @property
    def projections(self) -> list[Projection]:
        """All projections in order."""
        return [projection for layer in self.layers for stage in layer for projection in stage]

    @property
    def dense_bytes(self) -> int:
        """16-bit bytes of all projections, which ratios are taken of."""
        return sum(2 * projection.shape[0] * projection.shape[1] for projection in self.projections)

    @property
    def others(self) -> list[str]:
        """Tuned tensors that are not projections, aliases of tied weights left out."""
        projections = {projection.weight for projection in self.projections}
        return [name for name in self.tuned.names if name not in projections and name not in self.tuned.tied]

    def weights(self, projection: Projection, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's weight as stored and what the fine-tune adds to it in float32, on `device`.

        Raises:
            CheckpointError: NaN or infinite values.
        """
        name = projection.weight
        base, tuned = (
            require_finite(checkpoint.tensor(name).to(device), name, checkpoint.folder)
            for checkpoint in (self.base, self.tuned)
        )
        return base, tuned.float() - base.float()


@dataclass(frozen=True)
class CompressionPlan(Pair):
    """The pair and what will become of each projection, known before any work starts.

    Attributes:
        recipe: with its budget as a ratio; the one to begin with, if a quality is looked for.
        bands: of every projection; stand-ins where they are `auto`.
    """

    recipe: Recipe
    bands: dict[str, BandPlan]

    def at(self, ratio: float) -> CompressionPlan:
        """The same at another ratio."""
        return _planned(self, self.recipe.at(ratio))

    @property
    def shrunk(self) -> list[Projection]:
        """Projections whose fixed bands had to shrink to meet the ratio."""
        return [projection for projection in self.projections if self.bands[projection.weight].shrunk]


def plan_compression(base: str | Path, tuned: str | Path, recipe: Recipe) -> CompressionPlan:
    """Opens and compares the pair and solves the bands of every projection.

    Raises:
        CheckpointError: a broken checkpoint, an unsupported architecture, or shapes that do not match.
        RecipeError: a budget that no rank meets, or that is more than the projections have.
    """
    pair = open_pair(base, tuned)
    if recipe.max_kl is not None:
        return _first_plan(pair, recipe)
    settled = recipe.settled(pair.dense_bytes)
    try:
        return _planned(pair, settled)
    except RecipeError as error:
        if recipe.max_bytes is None:
            raise
        raise RecipeError(f"max_bytes {recipe.max_bytes}, {error}") from error


def _first_plan(pair: Pair, recipe: Recipe) -> CompressionPlan:
    """What the search for a quality begins with: the usual ratio, or more where a small model has no room in it."""
    *smaller, last = (min(1.0, recipe.ratio * 2**step) for step in range(5))
    for ratio in smaller:
        with suppress(RecipeError):
            return _planned(pair, recipe.model_copy(update={"ratio": ratio}))
    return _planned(pair, recipe.model_copy(update={"ratio": last}))


def _planned(pair: Pair, recipe: Recipe) -> CompressionPlan:
    if recipe.allocated:
        _require_room(pair, recipe)
    bands = {p.weight: recipe.plan(p.kind, p.shape) for p in pair.projections}
    return CompressionPlan(pair.base, pair.tuned, pair.layers, recipe, bands)


def _require_room(pair: Pair, recipe: Recipe) -> None:
    """Refuses a common budget that not one singular vector fits, before anything is measured."""
    budget = recipe.ratio * pair.dense_bytes
    band = Band(min(recipe.widths), 1)
    need = min(factored_bytes(p.shape, (band,), recipe.group_size).total for p in pair.projections)
    if need > budget:
        raise RecipeError(
            f"ratio {recipe.ratio:g}: all projections together have a budget of {int(budget)} bytes, and rank 1 at "
            f"{band.bits} bits takes {need}"
        )


def open_pair(base: str | Path, tuned: str | Path) -> Pair:
    """Opens and compares the pair.

    Raises:
        CheckpointError: as `plan_compression`.
    """
    base_checkpoint, tuned_checkpoint = Checkpoint.open(base), Checkpoint.open(tuned)
    family_of(base_checkpoint)
    layers = family_of(tuned_checkpoint).projections(tuned_checkpoint)
    pair = Pair(base_checkpoint, tuned_checkpoint, layers)
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


def resume_key(plan: Pair, options: CompressionOptions) -> dict[str, Any]:
    """What must agree for unfinished work to be continued: options, inputs, and what decides rounding."""
    return {
        "base": plan.base.fingerprint(),
        "tuned": plan.tuned.fingerprint(),
        "recipe": options.recipe.model_dump(mode="json"),
        "calibration": options.calibration,
        "calibration_text": source_digest(options.calibration) if options.calibrated else None,
        "held_out": options.held_out,
        "held_out_text": source_digest(options.held_out) if options.held_out else None,
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
