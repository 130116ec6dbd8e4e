# SPDX-License-Identifier: Apache-2.0
"""All projections of a pair in given bands, layer by layer, so that a stopped run goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from time import monotonic

import torch
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.drift import OwnStream, StageMoments, stage_moments
from deltaweave.converter.families import Projection
from deltaweave.converter.overlap import hand_over
from deltaweave.converter.projection import compress_stage
from deltaweave.converter.recipe import BandPlan
from deltaweave.converter.svd import Factors, whitened_svd
from deltaweave.converter.text import CalibrationData
from deltaweave.converter.work import Streams, Work
from deltaweave.converter.workspace import layer_part
from deltaweave.formats import Record

__all__ = ["LayerCompression"]

# How often a layer's input is made durable. A layer takes minutes on the CPU and two seconds on a GPU: less than a
# resumed run is willing to repeat, and too few to write 4 GB in, for whose seven seconds all else waits.
SECONDS_BETWEEN_SAVES = {"cpu": 0.0, "cuda": 120.0}


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


class LayerCompression:
    """One pass over the layers of a plan whose bands are known; finished layers lie in the workspace."""

    def __init__(self, work: Work) -> None:
        self.work, self.plan, self.workspace = work, work.plan, work.workspace

    def run(self) -> None:
        """Compresses the layers that are not yet finished; without calibration, rounds to nearest."""
        work = self.work
        if self._finished_layers() < len(self.plan.layers):
            if work.calibration and work.streams:
                self._layers_with_data(work.calibration, work.streams)
            else:
                self._layers_without_data()
        work.overlap.flush()

    def records(self) -> dict[str, Record]:
        """The projections' records, once `run` is through."""
        parts = [layer_part(layer) for layer in range(len(self.plan.layers))]
        return {name: record for part in parts for name, record in self.workspace.load(part).items()}

    def _finished_layers(self) -> int:
        layers = range(len(self.plan.layers))
        return next((layer for layer in layers if not self.workspace.has(layer_part(layer))), len(layers))

    def _layers_without_data(self) -> None:
        layers, first = self.plan.layers, self._finished_layers()
        differences = self._differences(first)
        for layer in range(first, len(layers)):
            records: dict[str, Record] = {}
            for step, stage in enumerate(layers[layer]):
                self.work.progress("compressing", layer + step / len(layers[layer]), len(layers))
                records |= self._compress(stage, next(differences))
            self.work.overlap.write(partial(self.workspace.save, layer_part(layer), records))

    def _layers_with_data(self, calibration: CalibrationData, streams: Streams) -> None:
        stream, layers, first = streams.served, self.plan.layers, self.workspace.saved_activations
        differences = self._differences(first)
        inputs = self._first_inputs(stream, calibration, first)
        own = self._own(streams.own, calibration, first)
        saved = monotonic()
        for layer in range(first, len(layers)):
            stream.load(layer, without=[projection.weight for stage in layers[layer] for projection in stage])
            if own:
                own.stream.load(layer)
            records: dict[str, Record] = {}
            for step, stage in enumerate(layers[layer]):
                moments = self._moments(stream, own, stage, inputs, step)
                records |= self._compress(stage, next(differences), moments, stream)
                if stage[0].closes_half and stage is not layers[-1][-1]:
                    inputs = self._through_half(stream, stage[0], inputs)
            durable = None
            if layer + 1 < len(layers) and monotonic() - saved >= SECONDS_BETWEEN_SAVES[self.work.device.type]:
                durable, saved = inputs, monotonic()
            self.work.overlap.write(partial(self._commit, layer, records, durable))
            stream.unload(layer)
            if own:
                own.stream.unload(layer)
        self.workspace.drop_own()

    def _own(self, stream: BlockStream | None, calibration: CalibrationData, first: int) -> OwnStream | None:
        """The fine-tune as it is, walked to where the work goes on; None where drift is not corrected."""
        if stream is None:
            return None
        shape = (*calibration.tokens.shape, int(self.plan.tuned.config["hidden_size"]))
        own = OwnStream(stream, Activations.create(self.workspace.own, shape, stream.dtype, self.work.device))
        stream.embed(calibration.tokens, own.inputs)
        for layer in range(first):
            stream.load(layer)
            own.advance(layer)
            stream.unload(layer)
        return own

    def _first_inputs(self, stream: BlockStream, calibration: CalibrationData, first: int) -> Activations:
        samples, length = calibration.tokens.shape
        shape = (samples, length, int(self.plan.tuned.config["hidden_size"]))
        path = self.workspace.activations(first)
        if first:
            return Activations.load(path, shape, stream.dtype, self.work.device)
        inputs = Activations.create(path, shape, stream.dtype, self.work.device)
        stream.embed(calibration.tokens, inputs)
        return inputs

    def _commit(self, layer: int, records: dict[str, Record], outputs: Activations | None) -> None:
        """Saves a layer's records and then, if they are to be the next resumed run's start, its outputs."""
        self.workspace.save(layer_part(layer), records)
        if outputs is not None:
            outputs.save()
        self.workspace.drop_activations(layer + 1)

    def _moments(
        self, stream: BlockStream, own: OwnStream | None, stage: list[Projection], inputs: Activations, step: int
    ) -> StageMoments:
        first, steps = stage[0], len(self.plan.layers[0])

        def report(done: int) -> None:
            # A stage's share of its layer is taken as equal; half of it goes to the data, half to SVD and GPTQ.
            part = (step + 0.5 * done / inputs.pieces) / steps
            self.work.progress("compressing", first.layer + part, len(self.plan.layers))

        if own is None:
            return StageMoments(stream.second_moment(first, inputs, report))
        return stage_moments(stream, own, first, inputs, report)

    def _compress(
        self,
        stage: list[Projection],
        differences: list[_Difference],
        moments: StageMoments | None = None,
        stream: BlockStream | None = None,
    ) -> dict[str, Record]:
        """A stage's records. Gives `stream` the weights that will be served: what follows is calibrated behind them."""
        deltas = [difference.delta for difference in differences]
        bands = [self.plan.bands[projection.weight] for projection in stage]
        hessian = moments.inputs if moments else None
        factors = [
            _chosen(difference.factors or whitened_svd(difference.delta, _required(hessian), plan.triplets), plan)
            for difference, plan in zip(differences, bands, strict=True)
        ]
        lacking = None
        if moments and moments.strayed is not None:
            lacking = [moments.lacking(difference.base.float() + difference.delta) for difference in differences]
        results = compress_stage(deltas, factors, bands, hessian, self.plan.recipe, lacking)
        records: dict[str, Record] = {}
        for projection, difference, result in zip(stage, differences, results, strict=True):
            if result.record is not None:
                records[projection.weight] = result.record
            if stream is not None:
                stream.set_weight(projection, difference.base.float() + result.delta)
        return records

    def _differences(self, first: int) -> Iterator[list[_Difference]]:
        """The differences of every stage from layer `first` on; they need no data, so a GPU makes them ahead."""
        stages = (stage for layer in self.plan.layers[first:] for stage in layer)
        return self.work.overlap.ahead(lambda stage: [self._difference(projection) for projection in stage], stages)

    def _difference(self, projection: Projection) -> _Difference:
        base, delta = self.plan.weights(projection, self.work.device)
        factors = None
        if not (self.plan.recipe.whiten and self.work.options.calibrated):
            triplets = self.plan.bands[projection.weight].triplets
            factors = self.work.decompositions.factors(projection.weight, delta, triplets)
        hand_over(base, delta, *((factors.u, factors.sigma, factors.v) if factors else ()))
        return _Difference(base, delta, factors)

    def _through_half(self, stream: BlockStream, closing: Projection, inputs: Activations) -> Activations:
        """What half of a block, all of its projections compressed, makes of what reaches it."""
        outputs = inputs
        if closing.half == self.plan.layers[0][0][0].half:  # a resumed run may begin with a block's input: spare it
            outputs = inputs.successor(self.workspace.activations(closing.layer + 1))
            self.work.overlap.flush()  # on a GPU the input is about to be overwritten, and it may be being saved
        for rows, hidden in inputs.chunks():
            outputs.write(rows, stream.through_half(closing.layer, closing.half, hidden))
        return outputs


def _chosen(factors: Factors, plan: BandPlan) -> Factors:
    return factors if plan.order is None else factors.select(plan.order)


def _required(hessian: torch.Tensor | None) -> torch.Tensor:
    assert hessian is not None  # `_difference` leaves the decomposition to later only if there is data
    return hessian
