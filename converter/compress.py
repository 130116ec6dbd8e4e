# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints to one delta file: streamed layer by layer, resumable, the same bytes however often it was killed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.calibration import (
    Activations,
    BlockStream,
    CalibrationData,
    default_sequence_length,
)
from deltaweave.converter.checkpoint import require_finite
from deltaweave.converter.families import Projection
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
from deltaweave.converter.workspace import OTHERS_PART, Workspace, layer_part, output_folder
from deltaweave.formats import BaseIdentity, Record, TensorIdentity
from torch import nn

__all__ = ["compress"]

IDENTITY_FILE = "base.json"


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

    def run(self, output: Path, *, force: bool, command: str | None) -> Path:
        calibration = self._calibration() if self.options.calibrated else None
        first = self._finished_layers()
        if calibration is None:
            self._layers_without_data(first)
        else:
            self._layers_with_data(first, calibration)
        self._others()
        identity = self._base_identity()
        package(
            output,
            self.plan,
            self._records(),
            identity,
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
        return {
            "name": name,
            "recipe": recipe.model_dump(),
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

    def _layers_without_data(self, first: int) -> None:
        layers = self.plan.layers
        for layer in range(first, len(layers)):
            records: dict[str, Record] = {}
            for step, stage in enumerate(layers[layer]):
                self.progress("compressing", layer + step / len(layers[layer]), len(layers))
                records |= self._compress(stage, None)[0]
            self.workspace.save(layer_part(layer), records)

    def _layers_with_data(self, first: int, calibration: CalibrationData) -> None:
        layers = self.plan.layers
        if first == len(layers):
            return
        samples, length = calibration.tokens.shape
        stream = BlockStream(self.plan.tuned, length, self.device)
        shape = (samples, length, int(self.plan.tuned.config["hidden_size"]))
        inputs = Activations(self.workspace.activations(first), shape, stream.dtype)
        if first == 0:
            stream.embed(calibration.tokens, inputs)
        for layer in range(first, len(layers)):
            block = stream.load(layer)
            records: dict[str, Record] = {}
            for step, stage in enumerate(layers[layer]):
                hessian = self._second_moment(stream, stage, inputs, step)
                found, deltas = self._compress(stage, hessian)
                records |= found
                self._install(block, stage, deltas)
            if layer + 1 < len(layers):
                inputs = self._propagate(
                    stream,
                    layer,
                    inputs,
                    Activations(self.workspace.activations(layer + 1), shape, stream.dtype),
                )
            self.workspace.save(layer_part(layer), records)
            stream.unload(layer)

    def _second_moment(
        self, stream: BlockStream, stage: list[Projection], inputs: Activations, step: int
    ) -> torch.Tensor:
        layer, steps, pieces = stage[0].layer, len(self.plan.layers[0]), inputs.pieces(self.device)

        def report(done: int) -> None:
            # A stage's share of its layer is taken as equal; half of it goes to the data, half to SVD and GPTQ.
            part = (step + 0.5 * done / pieces) / (steps + 1)
            self.progress("compressing", layer + part, len(self.plan.layers))

        return stream.second_moment(layer, stage[0].module, inputs, report)

    def _compress(
        self, stage: list[Projection], hessian: torch.Tensor | None
    ) -> tuple[dict[str, Record], list[torch.Tensor]]:
        deltas = [self._delta(projection) for projection in stage]
        bands = [self.plan.bands[projection.weight] for projection in stage]
        results = compress_stage(deltas, bands, hessian, self.options.recipe)
        named = zip(stage, results, strict=True)
        records = {projection.weight: result.record for projection, result in named if result.record is not None}
        return dict(records), [result.delta for result in results]

    def _delta(self, projection: Projection) -> torch.Tensor:
        name = projection.weight
        tuned = require_finite(self.plan.tuned.tensor(name), name, self.plan.tuned.folder).to(self.device).float()
        base = require_finite(self.plan.base.tensor(name), name, self.plan.base.folder).to(self.device)
        return tuned - base.float()

    def _install(self, block: nn.Module, stage: list[Projection], deltas: list[torch.Tensor]) -> None:
        """Gives the block the weights that will be served, so that later stages are calibrated behind them."""
        for projection, delta in zip(stage, deltas, strict=True):
            base = self.plan.base.tensor(projection.weight).to(self.device).float()
            module = block.get_submodule(projection.module)
            served = (base + delta).to(next(module.parameters()).dtype)
            module.weight = nn.Parameter(served, requires_grad=False)

    def _propagate(self, stream: BlockStream, layer: int, inputs: Activations, outputs: Activations) -> Activations:
        steps, pieces = len(self.plan.layers[0]), inputs.pieces(self.device)
        for done, (rows, hidden) in enumerate(inputs.chunks(self.device)):
            self.progress("compressing", layer + (steps + done / pieces) / (steps + 1), len(self.plan.layers))
            outputs.write(rows, stream.forward(layer, hidden))
        outputs.flush()
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
