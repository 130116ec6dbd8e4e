# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints to one delta file: streamed layer by layer, resumable, the same bytes however often it was killed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from deltaweave.converter.allocation import RELIEF, Allocation, DistortionTable, allocate, distortion_table
from deltaweave.converter.calibration import (
    Activations,
    BlockStream,
    CalibrationData,
    default_sequence_length,
)
from deltaweave.converter.checkpoint import require_finite
from deltaweave.converter.families import Projection
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
from deltaweave.converter.projection import compress_stage
from deltaweave.converter.recipe import BandPlan
from deltaweave.converter.sensitivity import MEASURED_TOKENS, LayerSensitivity, layer_sensitivities
from deltaweave.converter.svd import Factors, truncated_svd, whitened_svd
from deltaweave.converter.workspace import OTHERS_PART, Workspace, layer_part, output_folder
from deltaweave.formats import Band, BaseIdentity, Record, TensorIdentity
from torch import nn

__all__ = ["compress"]

IDENTITY_FILE = "base.json"
ALLOCATION_FILE = "allocation.json"
# How often a layer's input is made durable. A layer takes minutes on the CPU and two seconds on a GPU: too few to write
# 2 GB in, and less than a resumed run is willing to repeat.
SECONDS_BETWEEN_SAVES = {"cpu": 0.0, "cuda": 20.0}


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
        options: recipe, calibration and the like.
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
    workspace = Workspace(output.with_name(output.name + ".partial"), resume_key(plan, options), restart=restart)
    return _Compression(plan, options, workspace, progress or silent).run(output, force=force, command=command)


@dataclass(frozen=True)
class _Difference:
    """A projection before compression.

    Attributes:
        base: [out_features, in_features] in its stored dtype.
        delta: tuned minus base, float32.
        factors: the part of `delta` that is kept; None where that needs the input's second moment.
    """

    base: torch.Tensor
    delta: torch.Tensor
    factors: Factors | None


class _Compression:
    """One run of `compress`."""

    def __init__(
        self,
        plan: CompressionPlan,
        options: CompressionOptions,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.plan, self.options, self.workspace, self.progress = plan, options, workspace, progress
        self.device = options.torch_device
        self.allocation: Allocation | None = None

    def run(self, output: Path, *, force: bool, command: str | None) -> Path:
        calibration = self._calibration() if self.options.calibrated else None
        # Built before any thread runs: meanwhile PyTorch's default dtype is another, in all threads.
        stream = self._stream(calibration)
        with Overlap.beside(self.device) as overlap:
            others, identity = overlap.aside(self._others), overlap.aside(self._base_identity)
            if self.options.recipe.allocated:
                self.allocation = self._allocation(calibration, stream)
                self.plan = replace(self.plan, bands=self.allocation.bands)
            if self._finished_layers() < len(self.plan.layers):
                if calibration and stream:
                    self._layers_with_data(overlap, calibration, stream)
                else:
                    self._layers_without_data(overlap)
            overlap.flush()
            others()
            base = identity()
        package(
            output,
            self.plan,
            self._records(),
            base,
            self._method(),
            calibration,
            force=force,
            command=command,
        )
        self.workspace.remove()
        return output

    def _records(self) -> dict[str, Record]:
        parts = [layer_part(layer) for layer in range(len(self.plan.layers))] + [OTHERS_PART]
        return {name: record for part in parts for name, record in self.workspace.load(part).items()}

    def _base_identity(self) -> BaseIdentity:
        """The base's digests, kept in the workspace: hashing 14 GB twice would be felt."""
        cached = self.workspace.cached_json(IDENTITY_FILE)
        if cached is not None:
            tensors = {name: TensorIdentity(**entry) for name, entry in cached.pop("tensors").items()}
            return BaseIdentity(tensors=tensors, **cached)
        identity = self.plan.base.identity(lambda done, total: self.progress("hashing the base", done, total))
        self.workspace.cache_json(IDENTITY_FILE, asdict(identity))
        return identity

    def _method(self) -> dict[str, Any]:
        recipe, options = self.options.recipe, self.options
        name = "low-rank" if recipe.name == "low-rank" else "delta-come" if options.calibrated else "round-to-nearest"
        if self.allocation is not None and options.calibrated:
            name = "optimal"
        return {
            "name": name,
            "recipe": recipe.model_dump(mode="json"),
            "seed": options.seed,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__.partition("+")[0],
        }

    def _finished_layers(self) -> int:
        layers = range(len(self.plan.layers))
        return next((layer for layer in layers if not self.workspace.has(layer_part(layer))), len(layers))

    def _calibration(self) -> CalibrationData:
        options, tuned = self.options, self.plan.tuned
        length = options.sequence_length or default_sequence_length(tuned.config)
        return CalibrationData.load(options.calibration, tuned.folder, options.samples, length, options.seed)

    def _stream(self, calibration: CalibrationData | None) -> BlockStream | None:
        return BlockStream(self.plan.tuned, calibration.tokens.shape[1], self.device) if calibration else None

    def _allocation(self, calibration: CalibrationData | None, stream: BlockStream | None) -> Allocation:
        """Every projection's bands, measured once and kept in the workspace."""
        cached = self.workspace.cached_json(ALLOCATION_FILE)
        if cached is not None:
            bands = {
                name: BandPlan(tuple(Band(bits, rank) for bits, rank in entry["bands"]), order=tuple(entry["order"]))
                for name, entry in cached.pop("bands").items()
            }
            return Allocation(bands, **cached)
        recipe = self.options.recipe
        tables = dict(self._tables(calibration, stream))
        budget = recipe.ratio * sum(2 * p.shape[0] * p.shape[1] for p in self.plan.projections)
        found = allocate(tables, recipe.widths, recipe.group_size, budget)
        stored = {
            name: {"bands": [(band.bits, band.rank) for band in plan.bands], "order": plan.order}
            for name, plan in found.bands.items()
        }
        self.workspace.cache_json(ALLOCATION_FILE, {**vars(found), "bands": stored})
        return found

    def _tables(
        self, calibration: CalibrationData | None, stream: BlockStream | None
    ) -> Iterator[tuple[str, DistortionTable]]:
        """What every projection's singular vectors are worth, in the measure of the recipe's sensitivity."""
        layers, sensitivity = self.plan.layers, self.options.recipe.sensitivity
        if calibration is None or stream is None or sensitivity == "weight":
            for layer in range(len(layers)):
                self.progress("measuring", layer, len(layers))
                yield from self._layer_tables(layer, None)
            return
        length = calibration.tokens.shape[1]
        tokens = calibration.tokens[: -(-MEASURED_TOKENS // length)]
        shape = (len(tokens), length, int(self.plan.tuned.config["hidden_size"]))
        paths = [self.workspace.measured(layer) for layer in range(len(layers) + 1)]
        try:
            activations = [Activations.create(path, shape, stream.dtype, self.device) for path in paths]
            stream.embed(tokens, activations[0])
            measured = layer_sensitivities(
                stream,
                layers,
                activations,
                tokens.numel(),
                self.options.seed,
                lambda done: self.progress("measuring", done * len(layers), len(layers)),
            )
            for layer, moments in measured:
                yield from self._layer_tables(layer, moments)
        finally:
            self.workspace.drop_measured()

    def _layer_tables(self, layer: int, moments: LayerSensitivity | None) -> Iterator[tuple[str, DistortionTable]]:
        recipe = self.options.recipe
        for projection in (projection for stage in self.plan.layers[layer] for projection in stage):
            name, (out_features, in_features) = projection.weight, projection.shape
            _, delta = self._weights(projection)
            inputs = moments.inputs[name] if moments else torch.eye(in_features, device=self.device)
            outputs = torch.eye(out_features, device=self.device)
            if moments and recipe.sensitivity in ("balanced", "fisher"):
                outputs = moments.outputs[name]
            rank = min(projection.shape)
            factors = whitened_svd(delta, inputs, rank) if recipe.whiten and moments else truncated_svd(delta, rank)
            relief = RELIEF if self.options.calibrated else 1.0
            power = 0.5 if recipe.sensitivity == "balanced" else 1.0
            table = distortion_table(
                factors, inputs, outputs, recipe.widths, recipe.group_size, recipe.grid, relief, power
            )
            yield name, table

    def _layers_without_data(self, overlap: Overlap) -> None:
        layers, first = self.plan.layers, self._finished_layers()
        differences = self._differences(overlap, first)
        for layer in range(first, len(layers)):
            records: dict[str, Record] = {}
            for step, stage in enumerate(layers[layer]):
                self.progress("compressing", layer + step / len(layers[layer]), len(layers))
                records |= self._compress(stage, next(differences))
            overlap.write(partial(self.workspace.save, layer_part(layer), records))

    def _layers_with_data(self, overlap: Overlap, calibration: CalibrationData, stream: BlockStream) -> None:
        layers, first = self.plan.layers, self.workspace.saved_activations
        differences = self._differences(overlap, first)
        inputs = self._first_inputs(stream, calibration, first)
        saved = monotonic()
        for layer in range(first, len(layers)):
            block = stream.load(layer, without=[projection.weight for stage in layers[layer] for projection in stage])
            records: dict[str, Record] = {}
            for step, stage in enumerate(layers[layer]):
                hessian = self._second_moment(stream, stage, inputs, step)
                records |= self._compress(stage, next(differences), hessian, block)
            durable = None
            if layer + 1 < len(layers):
                inputs = self._propagate(stream, layer, inputs)
                if monotonic() - saved >= SECONDS_BETWEEN_SAVES[self.device.type]:
                    durable, saved = inputs, monotonic()
            overlap.write(partial(self._commit, layer, records, durable))
            stream.unload(layer)

    def _first_inputs(self, stream: BlockStream, calibration: CalibrationData, first: int) -> Activations:
        samples, length = calibration.tokens.shape
        shape = (samples, length, int(self.plan.tuned.config["hidden_size"]))
        path = self.workspace.activations(first)
        if first:
            return Activations.load(path, shape, stream.dtype, self.device)
        inputs = Activations.create(path, shape, stream.dtype, self.device)
        stream.embed(calibration.tokens, inputs)
        return inputs

    def _commit(self, layer: int, records: dict[str, Record], outputs: Activations | None) -> None:
        """Saves a layer's records and then, if they are to be the next resumed run's start, its outputs."""
        self.workspace.save(layer_part(layer), records)
        if outputs is not None:
            outputs.save()
        self.workspace.drop_activations(layer + 1)

    def _second_moment(
        self, stream: BlockStream, stage: list[Projection], inputs: Activations, step: int
    ) -> torch.Tensor:
        layer, steps = stage[0].layer, len(self.plan.layers[0])

        def report(done: int) -> None:
            # A stage's share of its layer is taken as equal; half of it goes to the data, half to SVD and GPTQ.
            part = (step + 0.5 * done / inputs.pieces) / (steps + 1)
            self.progress("compressing", layer + part, len(self.plan.layers))

        return stream.second_moment(layer, stage[0].module, inputs, report)

    def _compress(
        self,
        stage: list[Projection],
        differences: list[_Difference],
        hessian: torch.Tensor | None = None,
        block: nn.Module | None = None,
    ) -> dict[str, Record]:
        """A stage's records. Gives `block` the weights that will be served: later stages are calibrated behind them."""
        deltas = [difference.delta for difference in differences]
        bands = [self.plan.bands[projection.weight] for projection in stage]
        factors = [
            _chosen(difference.factors or whitened_svd(difference.delta, _required(hessian), plan.triplets), plan)
            for difference, plan in zip(differences, bands, strict=True)
        ]
        results = compress_stage(deltas, factors, bands, hessian, self.options.recipe)
        records: dict[str, Record] = {}
        for projection, difference, result in zip(stage, differences, results, strict=True):
            if result.record is not None:
                records[projection.weight] = result.record
            if block is not None:
                module = block.get_submodule(projection.module)
                served = (difference.base.float() + result.delta).to(next(module.parameters()).dtype)
                module.weight = nn.Parameter(served, requires_grad=False)
        return records

    def _differences(self, overlap: Overlap, first: int) -> Iterator[list[_Difference]]:
        """The differences of every stage from layer `first` on; they need no data, so a GPU makes them ahead."""
        stages = (stage for layer in self.plan.layers[first:] for stage in layer)
        return overlap.ahead(lambda stage: [self._difference(projection) for projection in stage], stages)

    def _difference(self, projection: Projection) -> _Difference:
        base, delta = self._weights(projection)
        factors = None
        if not (self.options.recipe.whiten and self.options.calibrated):
            factors = truncated_svd(delta, self.plan.bands[projection.weight].triplets)
        if self.device.type == "cuda":
            for tensor in (base, delta, *((factors.u, factors.sigma, factors.v) if factors else ())):
                tensor.record_stream(torch.cuda.default_stream(self.device))
            torch.cuda.current_stream(self.device).synchronize()
        return _Difference(base, delta, factors)

    def _weights(self, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's weight as stored and what the fine-tune adds to it in float32, on the device."""
        name = projection.weight
        base, tuned = (
            require_finite(checkpoint.tensor(name).to(self.device), name, checkpoint.folder)
            for checkpoint in (self.plan.base, self.plan.tuned)
        )
        return base, tuned.float() - base.float()

    def _propagate(self, stream: BlockStream, layer: int, inputs: Activations) -> Activations:
        outputs = inputs.successor(self.workspace.activations(layer + 1))
        steps = len(self.plan.layers[0])
        for done, (rows, hidden) in enumerate(inputs.chunks()):
            self.progress("compressing", layer + (steps + done / inputs.pieces) / (steps + 1), len(self.plan.layers))
            outputs.write(rows, stream.forward(layer, hidden))
        return outputs

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


def _chosen(factors: Factors, plan: BandPlan) -> Factors:
    return factors if plan.order is None else factors.select(plan.order)


def _required(hessian: torch.Tensor | None) -> torch.Tensor:
    assert hessian is not None  # `_difference` leaves the decomposition to later only if there is data
    return hessian
