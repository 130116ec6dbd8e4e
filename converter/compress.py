# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints to one delta file: streamed layer by layer, resumable, the same bytes however often it was killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.allocation import DistortionTable, allocate, trade_curve
from deltaweave.converter.calibration import BlockStream
from deltaweave.converter.decompositions import Decompositions
from deltaweave.converter.errors import RecipeError
from deltaweave.converter.fidelity import Fidelity
from deltaweave.converter.layers import LayerCompression
from deltaweave.converter.measuring import Measurement
from deltaweave.converter.overlap import Overlap
from deltaweave.converter.packaging import package
from deltaweave.converter.plan import (
    CompressionOptions,
    CompressionPlan,
    Progress,
    plan_compression,
    resume_key,
    silent,
)
from deltaweave.converter.policies import other_record
from deltaweave.converter.search import Attempt, Curve, best_of, search
from deltaweave.converter.text import DEFAULT_TEXT, CalibrationData, default_sequence_length
from deltaweave.converter.work import Streams, Work
from deltaweave.converter.workspace import OTHERS_PART, Workspace, output_folder
from deltaweave.formats import BaseIdentity, Record, TensorIdentity, record_bytes

__all__ = ["compress"]

IDENTITY_FILE = "base.json"
ATTEMPTS_FILE = "attempts.json"


def compress(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    options: CompressionOptions | None = None,
    *,
    force: bool = False,
    restart: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compresses the fine-tune `tuned` of `base` into a delta file (Delta-CoMe, arXiv 2406.08903).

    Unfinished work lies in `OUTPUT.partial/`; the same call resumes it and ends with the same bytes as an unbroken
    one on the same machine and versions.

    Args:
        base: Hugging Face folder of the base.
        tuned: Hugging Face folder of the fine-tune.
        output: the delta file to write; a model card is written beside it.
        options: recipe, calibration and the like. With the recipe's `max_kl`, a few ratios are tried, and the smallest
            file whose KL to the fine-tune on held-out text stays below it is written; what was measured is in its
            header's `method`.
        force: replace an existing output.
        restart: discard unfinished work instead of resuming it.
        command: the command line, for the model card.
        progress: told how far the work is.

    Returns:
        The output's path.

    Raises:
        DeltaweaveError: bad input, as one line; an existing output is left as it was.
    """
    options, output = options or CompressionOptions(), Path(output)
    output_folder(output, force=force)
    plan = plan_compression(base, tuned, options.recipe)
    texts = _texts(plan, options)
    workspace = Workspace(output.with_name(output.name + ".partial"), resume_key(plan, options), restart=restart)
    try:
        return _Run(plan, options, texts, workspace, progress or silent).write(output, force=force, command=command)
    except RecipeError:  # the same options will never make a file, and other options may not go on from here
        workspace.remove()
        raise


@dataclass(frozen=True)
class _Compressions:
    """Those of one run: they share everything that was read, measured or decomposed once."""

    work: Work
    tables: Mapping[str, DistortionTable] | None

    @classmethod
    def of(cls, work: Work) -> _Compressions:
        """Measures the tables, where bands are allocated by them."""
        return cls(work, Measurement(work).tables() if work.plan.recipe.allocated else None)

    def at(self, ratio: float, workspace: Workspace, progress: Progress) -> LayerCompression:
        """All projections at a ratio; what is finished in `workspace` is not made again."""
        layers = LayerCompression(replace(self.work, plan=self._plan(ratio), workspace=workspace, progress=progress))
        layers.run()
        return layers

    def curve(self, nothing: float) -> Curve:
        """What KL to expect at a ratio, `nothing` being that of no delta at all."""
        if self.tables is None:
            return Curve.square(_least_ratio(self.work.plan))
        recipe, dense = self.work.plan.recipe, self.work.plan.dense_bytes
        (_, whole), *points = trade_curve(self.tables, recipe.widths, recipe.group_size)
        return Curve([(stored / dense, distortion) for stored, distortion in points], (whole, nothing))

    def _plan(self, ratio: float) -> CompressionPlan:
        plan = self.work.plan.at(ratio)
        if self.tables is None:
            return plan
        budget = ratio * plan.dense_bytes
        return replace(plan, bands=allocate(self.tables, plan.recipe.widths, plan.recipe.group_size, budget).bands)


class _Run:
    """One run of `compress`."""

    def __init__(
        self,
        plan: CompressionPlan,
        options: CompressionOptions,
        texts: tuple[CalibrationData | None, CalibrationData | None],
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.plan, self.options, self.workspace, self.progress = plan, options, workspace, progress
        self.calibration, self.held_out = texts
        self.device = options.torch_device

    def write(self, output: Path, *, force: bool, command: str | None) -> Path:
        calibration, held_out = self.calibration, self.held_out
        # Built before any thread runs: meanwhile PyTorch's default dtype is another, in all threads.
        streams = self._streams(calibration)
        exact_stream = self._stream(held_out, torch.float32) if held_out else None
        quality: dict[str, Any] = {}
        with Overlap.beside(self.device) as overlap:
            others, identity = overlap.aside(self._others), overlap.aside(self._base_identity)
            compressions = _Compressions.of(self._work(overlap, streams))
            if held_out is None or exact_stream is None:
                made = compressions.at(self.plan.recipe.ratio, self.workspace, self.progress)
            else:
                others()
                fidelity = Fidelity(
                    self.plan,
                    held_out,
                    exact_stream,
                    self.workspace,
                    self.workspace.load(OTHERS_PART),
                    self.progress,
                )
                made, quality = self._searched(compressions, fidelity)
            others()
            base = identity()
        package(
            output,
            self.plan,
            {**made.records(), **self.workspace.load(OTHERS_PART)},
            base,
            self._method(made.plan) | quality,
            calibration,
            force=force,
            command=command,
        )
        self.workspace.remove()
        return output

    def _work(self, overlap: Overlap, streams: Streams | None) -> Work:
        recipe = self.plan.recipe
        again = recipe.allocated or recipe.max_kl is not None  # whether a projection is decomposed more than once
        return Work(
            self.plan,
            self.options,
            self.workspace,
            Decompositions(self.workspace.folder if again else None, overlap.write),
            overlap,
            self.calibration,
            streams,
            self.progress,
        )

    def _searched(self, compressions: _Compressions, fidelity: Fidelity) -> tuple[LayerCompression, dict[str, Any]]:
        """The smallest file within the recipe's `max_kl`, and what the header says of it."""
        limit = self.plan.recipe.max_kl
        assert limit is not None
        found = self.workspace.cached_json(ATTEMPTS_FILE) or {"nothing": fidelity.measure({}).kl, "attempts": []}
        if found["nothing"] <= limit:
            raise RecipeError(
                f"max_kl {limit:g}: the base's own projections have {found['nothing']:.3g}; nothing need be stored"
            )
        attempts = [Attempt(**attempt) for attempt in found["attempts"]]

        def attempt(ratio: float, predicted: float | None, number: int) -> Attempt:
            named = self._named(f"try {number + 1}, 1/{1 / ratio:.1f}")
            made = compressions.at(ratio, self._attempted(number), named)
            records = made.records()
            measured = fidelity.measure(records)
            size = sum(record_bytes(record).total for record in records.values())
            attempts.append(Attempt(ratio, size, predicted, measured.kl, measured.error))
            stored = {**found, "attempts": [asdict(attempt) for attempt in attempts]}
            self.workspace.cache_json(ATTEMPTS_FILE, stored)
            self._drop_attempts(best_of(limit, attempts), attempts)
            return attempts[-1]

        first = self.plan.recipe.ratio if compressions.tables is None else None
        best = search(limit, compressions.curve(found["nothing"]), first, tuple(attempts), attempt)
        made = compressions.at(best.ratio, self._attempted(attempts.index(best)), self.progress)
        tried = [asdict(attempt) for attempt in attempts]
        return made, {"quality": {**fidelity.described, "max_kl": limit, "chosen": asdict(best), "attempts": tried}}

    def _attempted(self, number: int) -> Workspace:
        return self.workspace.attempt(f"attempt-{number}")

    def _drop_attempts(self, best: Attempt | None, attempts: Sequence[Attempt]) -> None:
        """Deletes what lost, to make room for the next."""
        for number, attempt in enumerate(attempts):
            if attempt is not best:
                self._attempted(number).remove()

    def _named(self, name: str) -> Progress:
        return lambda what, done, total: self.progress(f"{name}: {what}", done, total)

    def _base_identity(self) -> BaseIdentity:
        """The base's digests, kept in the workspace: hashing 14 GB twice would be felt."""
        cached = self.workspace.cached_json(IDENTITY_FILE)
        if cached is not None:
            tensors = {name: TensorIdentity(**entry) for name, entry in cached.pop("tensors").items()}
            return BaseIdentity(tensors=tensors, **cached)
        identity = self.plan.base.identity(lambda done, total: self.progress("hashing the base", done, total))
        self.workspace.cache_json(IDENTITY_FILE, asdict(identity))
        return identity

    def _method(self, made: CompressionPlan) -> dict[str, Any]:
        recipe, options = self.options.recipe, self.options
        name = "low-rank" if recipe.name == "low-rank" else "delta-come" if options.calibrated else "round-to-nearest"
        if recipe.allocated and options.calibrated:
            name = "optimal"
        return {
            "name": name,
            "recipe": {**recipe.model_dump(mode="json"), "ratio": made.recipe.ratio},
            "seed": options.seed,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__.partition("+")[0],
        }

    def _streams(self, text: CalibrationData | None) -> Streams | None:
        if text is None:
            return None
        if not self.plan.recipe.correct_drift:
            stream = self._stream(text)
            return Streams(stream, stream)
        on_gpu = self.device.type == "cuda"
        served, own = (self._stream(text, torch.float32, half_products=on_gpu) for _ in range(2))  # why: drift.py
        return Streams(served, self._stream(text) if on_gpu else served, own)

    def _stream(
        self, text: CalibrationData, dtype: torch.dtype | None = None, *, half_products: bool = False
    ) -> BlockStream:
        return BlockStream(self.plan.tuned, text.tokens.shape[1], self.device, dtype, half_products=half_products)

    def _others(self) -> None:
        if self.workspace.has(OTHERS_PART):
            return
        plan, options = self.plan, self.options
        records: dict[str, Record] = {}
        for done, name in enumerate(plan.others):
            self.progress("norms, biases, embeddings", done, len(plan.others))
            record = other_record(plan.base, plan.tuned, name, options.effective_policies, options.recipe.group_size)
            if record is not None:
                records[name] = record
        self.workspace.save(OTHERS_PART, records)


def _texts(plan: CompressionPlan, options: CompressionOptions) -> tuple[CalibrationData | None, CalibrationData | None]:
    """What is calibrated on, and what a quality is measured on, if they are wanted."""
    folder, measured = plan.tuned.folder, plan.recipe.max_kl is not None
    length = options.sequence_length or default_sequence_length(plan.tuned.config)
    if options.calibrated and measured and options.held_out is None:
        return CalibrationData.split(options.calibration, folder, options.samples, length, options.seed)
    calibration = held_out = None
    if options.calibrated:
        calibration = CalibrationData.load(options.calibration, folder, options.samples, length, options.seed)
    if measured:
        held_out = CalibrationData.held_out(options.held_out or DEFAULT_TEXT, folder, length)
    return calibration, held_out


def _least_ratio(plan: CompressionPlan) -> float:
    """The least ratio that the plan's bands fit, to a hundredth of it."""
    low, high = 0.0, plan.recipe.ratio
    while high - low > high / 100:
        middle = (low + high) / 2
        try:
            plan.at(middle)
            high = middle
        except RecipeError:
            low = middle
    return high
