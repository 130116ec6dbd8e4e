# SPDX-License-Identifier: Apache-2.0
"""BitDelta (arXiv 2402.10193), the one-bit baseline: the sign of each delta and one scale per matrix.

Scales start at the mean magnitude, which is their least-squares value, and are then distilled: the student's logits
are drawn to the fine-tune's on calibration text. This baseline holds both models in memory; it is here to be compared
with, not to be streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from deltaweave.converter.checkpoint import require_finite
from deltaweave.converter.families import Projection
from deltaweave.converter.packaging import package
from deltaweave.converter.plan import NO_CALIBRATION, Pair, Progress, open_pair, silent
from deltaweave.converter.policies import Policies, other_record
from deltaweave.converter.text import CalibrationData
from deltaweave.converter.workspace import output_folder
from deltaweave.formats import Band, DenseRecord, PackedBand, PackedMatrix, Record, pack_codes
from torch import nn
from torch.nn.functional import linear, mse_loss
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

__all__ = ["BitDeltaOptions", "compress_bitdelta"]

OTHERS_GROUP_SIZE = 128
disable_progress_bar()


@dataclass(frozen=True)
class BitDeltaOptions:
    """Settings of the distillation; the published run used 200 steps of 4 sequences of 128 tokens.

    Attributes:
        calibration: `default`, a .txt or .jsonl file, or `none` to keep the undistilled scales.
        steps: optimizer steps.
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        learning_rate: of Adam, on the logarithm of each scale.
        seed: of the windows drawn from the text.
        policies: embeddings and lm_head.
        device: where the distillation runs; None takes the GPU if there is one.
    """

    calibration: str = "default"
    steps: int = 200
    batch_size: int = 4
    sequence_length: int = 128
    learning_rate: float = 1e-2
    seed: int = 0
    policies: Policies = field(default_factory=Policies)
    device: str | None = None

    @property
    def torch_device(self) -> torch.device:
        """The device that will be used."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def compress_bitdelta(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    options: BitDeltaOptions | None = None,
    *,
    force: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Writes the BitDelta of a pair: `dense` one-bit records, at their native size whatever the ratio elsewhere.

    Raises:
        DeltaweaveError: bad input, as one line; an existing output is left as it was.
    """
    options, output = options or BitDeltaOptions(), Path(output)
    output_folder(output, force=force)
    plan = open_pair(base, tuned)
    deltas = {projection.weight: _delta(plan, projection) for projection in plan.projections}
    scales = {name: delta.abs().mean() for name, delta in deltas.items()}
    calibration = None
    if options.calibration != NO_CALIBRATION:
        windows = options.steps * options.batch_size
        calibration = CalibrationData.load(
            options.calibration, plan.tuned.folder, windows, options.sequence_length, options.seed
        )
        scales = _distilled(plan, deltas, scales, calibration, options, progress)
    records = {name: _record(delta, scales[name]) for name, delta in deltas.items() if delta.any()}
    for name in plan.others:
        record = other_record(plan.base, plan.tuned, name, options.policies, OTHERS_GROUP_SIZE)
        if record is not None:
            records[name] = record
    method = {
        "name": "bitdelta",
        "steps": options.steps if calibration else 0,
        "seed": options.seed,
    }
    identity = plan.base.identity(lambda done, total: progress("hashing the base", done, total))
    package(output, plan, records, identity, method, calibration, force=force, command=command)
    return output


def _delta(plan: Pair, projection: Projection) -> torch.Tensor:
    name = projection.weight
    tuned = require_finite(plan.tuned.tensor(name), name, plan.tuned.folder)
    return tuned.float() - require_finite(plan.base.tensor(name), name, plan.base.folder).float()


def _record(delta: torch.Tensor, scale: torch.Tensor) -> Record:
    """Codes 0 and 1 around a zero point of one half, one grid for the whole matrix."""
    out_features, in_features = delta.shape
    positive = (delta > 0).numpy()
    grid = np.array([2 * float(scale), 0.5], dtype=np.float16)
    packed = PackedBand(Band(1, out_features), pack_codes(positive.astype(np.uint8), 1), grid)
    matrix = PackedMatrix((packed,), in_features, None)
    error = delta - float(grid[0]) * (torch.from_numpy(positive).float() - 0.5)
    return DenseRecord((out_features, in_features), matrix, {"weight_error": float(error.norm() / delta.norm())})


class _SignedLinear(nn.Module):
    """The base's projection plus a scaled sign matrix; only the scale learns."""

    base: torch.Tensor
    sign: torch.Tensor
    start: torch.Tensor

    def __init__(
        self,
        base: torch.Tensor,
        delta: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.bias = bias
        self.register_buffer("base", base)
        self.register_buffer("sign", torch.where(delta > 0, 1.0, -1.0))
        self.register_buffer("start", scale)
        self.log_factor = nn.Parameter(torch.zeros(()))

    @property
    def scale(self) -> torch.Tensor:
        return self.start * self.log_factor.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.base, self.bias) + self.scale * linear(x, self.sign)


def _distilled(
    plan: Pair,
    deltas: dict[str, torch.Tensor],
    scales: dict[str, torch.Tensor],
    calibration: CalibrationData,
    options: BitDeltaOptions,
    progress: Callable[[str, float, float], None],
) -> dict[str, torch.Tensor]:
    teacher = AutoModelForCausalLM.from_pretrained(plan.tuned.folder, dtype=torch.float32).requires_grad_(False).eval()
    student = AutoModelForCausalLM.from_pretrained(plan.tuned.folder, dtype=torch.float32).requires_grad_(False).eval()
    layers = _install(student, plan, deltas, scales)
    device = options.torch_device
    teacher, student = teacher.to(device), student.to(device)
    optimizer = torch.optim.Adam([layer.log_factor for layer in layers.values()], lr=options.learning_rate)
    batches = calibration.tokens.split(options.batch_size)
    for step, tokens in enumerate(batches):
        progress("distilling scales", step, len(batches))
        tokens = tokens.to(device)
        with torch.no_grad():
            target = teacher(tokens, use_cache=False).logits
        optimizer.zero_grad()
        mse_loss(student(tokens, use_cache=False).logits, target).backward()
        optimizer.step()
    return {name: layer.scale.detach().cpu() for name, layer in layers.items()}


def _install(
    student: nn.Module,
    plan: Pair,
    deltas: dict[str, torch.Tensor],
    scales: dict[str, torch.Tensor],
) -> dict[str, _SignedLinear]:
    layers = {}
    for name, delta in deltas.items():
        module = name.removesuffix(".weight")
        bias = getattr(student.get_submodule(module), "bias")  # noqa: B009 - a Linear's, which nn.Module does not declare
        layers[name] = _SignedLinear(plan.base.tensor(name).float(), delta, scales[name], bias)
        student.set_submodule(module, layers[name])
    return layers
