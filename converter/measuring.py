# SPDX-License-Identifier: Apache-2.0
"""What every singular vector of a pair is worth at every bit width, measured once before bits are chosen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from deltaweave.converter.allocation import RELIEF, DistortionTable, distortion_table
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.errors import OutputError
from deltaweave.converter.families import Projection
from deltaweave.converter.overlap import hand_over
from deltaweave.converter.sensitivity import MEASURED_TOKENS, LayerSensitivity, layer_sensitivities
from deltaweave.converter.svd import Factors, whitened_svd
from deltaweave.converter.text import CalibrationData
from deltaweave.converter.work import Work
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

__all__ = ["Measurement"]

TABLES_FILE = "tables.safetensors"
# How far `balanced` trusts the moments: by this power of what they say, tried in docs/method.md.
TRUST = 2 / 3
# Tokens per backward, which holds everything that a block computes.
CHUNK_TOKENS = 2048
# Projections decomposed ahead: a layer's backward pass takes as long as four eigenproblems, two of them at a time.
DECOMPOSED_AHEAD = 4


class Measurement:
    """The tables of one pair, kept in its workspace."""

    def __init__(self, work: Work) -> None:
        self.work, self.plan, self.workspace = work, work.plan, work.workspace
        self.recipe, self.device = work.options.recipe, work.device

    def tables(self) -> Mapping[str, DistortionTable]:
        """Every projection's table, in the measure of the recipe's sensitivity."""
        calibration, streams = self.work.calibration, self.work.streams
        file = self.workspace.folder / TABLES_FILE
        if not file.is_file():
            if calibration is None or streams is None or self.recipe.sensitivity == "weight":
                tables = dict(self._unweighted())
            else:
                tables = dict(self._weighted(calibration, streams.measured))
            _save(file, tables)
        return _load(file)  # also when just measured: a resumed run has no other

    def _unweighted(self) -> Iterator[tuple[str, DistortionTable]]:
        layers = range(len(self.plan.layers))
        decompositions = self._decompositions(layers)
        for layer in layers:
            self.work.progress("measuring", layer, len(layers))
            yield from self._layer_tables(layer, None, decompositions)

    def _weighted(self, calibration: CalibrationData, stream: BlockStream) -> Iterator[tuple[str, DistortionTable]]:
        layers, length = self.plan.layers, calibration.tokens.shape[1]
        tokens = calibration.tokens[: -(-MEASURED_TOKENS // length)]
        shape = (len(tokens), length, int(self.plan.tuned.config["hidden_size"]))
        paths = [self.workspace.measured(layer) for layer in range(len(layers) + 1)]
        backwards = reversed(range(len(layers)))
        decompositions = self._decompositions(backwards, whiten=self.recipe.whiten)
        try:
            activations = [Activations.create(path, shape, stream.dtype, self.device, CHUNK_TOKENS) for path in paths]
            stream.embed(tokens, activations[0])
            measured = layer_sensitivities(
                stream,
                layers,
                activations,
                tokens.numel(),
                self.work.options.seed,
                lambda done: self.work.progress("measuring", done * len(layers), len(layers)),
            )
            for layer, moments in measured:
                yield from self._layer_tables(layer, moments, decompositions)
        finally:
            self.workspace.drop_measured()
            if self.device.type == "cuda":  # what is to come asks for other sizes
                activations = []
                torch.cuda.empty_cache()

    def _decompositions(self, layers: Iterable[int], *, whiten: bool = False) -> Iterator[Factors | torch.Tensor]:
        """Every projection's triplets, layers in the order of `layers`; a GPU makes them ahead.

        To be whitened, they need the input's moment: then it is the deltas that are made.
        """

        def decompose(projection: Projection) -> Factors | torch.Tensor:
            _, delta = self.plan.weights(projection, self.device)
            if whiten:
                hand_over(delta)
                return delta
            factors = self.work.decompositions.factors(projection.weight, delta, min(projection.shape))
            hand_over(factors.u, factors.sigma, factors.v)
            return factors

        projections = (p for layer in layers for stage in self.plan.layers[layer] for p in stage)
        return self.work.overlap.ahead(decompose, projections, DECOMPOSED_AHEAD)

    def _layer_tables(
        self, layer: int, moments: LayerSensitivity | None, decompositions: Iterator[Factors | torch.Tensor]
    ) -> Iterator[tuple[str, DistortionTable]]:
        recipe = self.recipe
        for projection in (projection for stage in self.plan.layers[layer] for projection in stage):
            name, (out_features, in_features) = projection.weight, projection.shape
            inputs = moments.inputs[name] if moments else torch.eye(in_features, device=self.device)
            outputs = torch.eye(out_features, device=self.device)
            if moments and recipe.sensitivity in ("balanced", "fisher"):
                outputs = moments.outputs[name]
            found = next(decompositions)
            factors = found if isinstance(found, Factors) else whitened_svd(found, inputs, min(projection.shape))
            relief = RELIEF if self.work.options.calibrated else 1.0
            power = TRUST if recipe.sensitivity == "balanced" else 1.0
            table = distortion_table(
                factors, inputs, outputs, recipe.widths, recipe.group_size, recipe.grid, relief, power
            )
            yield name, table


def _save(file: Path, tables: Mapping[str, DistortionTable]) -> None:
    """Writes tables durably, each as its shape and step, order and distortion."""
    tensors = {}
    for name, table in tables.items():
        tensors[f"{name}.extents"] = torch.tensor([*table.shape, table.step])
        tensors[f"{name}.order"] = table.order.contiguous()
        tensors[f"{name}.distortion"] = table.distortion.contiguous()
    temporary = file.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{file}: cannot be written ({error})") from error


def _load(file: Path) -> dict[str, DistortionTable]:
    tensors, tables = load_file(file), {}
    for key in sorted(key for key in tensors if key.endswith(".extents")):
        name = key.removesuffix(".extents")
        out_features, in_features, step = tensors[key].tolist()
        tables[name] = DistortionTable(
            (out_features, in_features), tensors[f"{name}.order"], tensors[f"{name}.distortion"], step
        )
    return tables
