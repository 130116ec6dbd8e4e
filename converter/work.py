# SPDX-License-Identifier: Apache-2.0
"""What a pass over the layers of a pair works with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deltaweave.converter.calibration import BlockStream
from deltaweave.converter.decompositions import Decompositions
from deltaweave.converter.overlap import Overlap
from deltaweave.converter.plan import CompressionOptions, CompressionPlan, Progress
from deltaweave.converter.text import CalibrationData
from deltaweave.converter.workspace import Workspace

__all__ = ["Streams", "Work"]


@dataclass(frozen=True)
class Streams:
    """The fine-tune block by block, for sequences of the calibration's length.

    Attributes:
        served: takes the weights that will be served as they are made.
        measured: is differentiated where sensitivities are measured.
        own: stays as it is while projections of `served` are compressed; None where drift is not corrected.
    """

    served: BlockStream
    measured: BlockStream
    own: BlockStream | None = None


@dataclass(frozen=True)
class Work:
    """One pass; those of one run (measuring, then one or more compressions) differ in plan, workspace and progress.

    Attributes:
        plan: the pair, and the bands of every projection where they are known.
        options: of the run.
        workspace: where results lie until the output is written.
        decompositions: every projection's singular triplets, made once a run.
        overlap: the threads beside the one that computes.
        calibration: the text that inputs are taken from; None weighs all alike.
        streams: the fine-tune; None without calibration.
        progress: told how far the pass is.
    """

    plan: CompressionPlan
    options: CompressionOptions
    workspace: Workspace
    decompositions: Decompositions
    overlap: Overlap
    calibration: CalibrationData | None
    streams: Streams | None
    progress: Progress

    @property
    def device(self) -> torch.device:
        """That the pass computes on."""
        return self.options.torch_device
