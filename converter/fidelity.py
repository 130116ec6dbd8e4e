# SPDX-License-Identifier: Apache-2.0
"""KL of base + delta to the fine-tune on held-out text, measured from records before there is a file.

Both models are walked block by block like the calibration is, in float32, so that the memory is that of a block and a
head, and the noise of 16-bit activations does not count as the delta's. The fine-tune is walked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.calibration import Activations, BlockStream
from deltaweave.converter.checkpoint import EMBEDDING, HEAD
from deltaweave.converter.errors import CheckpointError
from deltaweave.converter.plan import Pair, Progress
from deltaweave.converter.text import CalibrationData
from deltaweave.converter.workspace import Workspace
from deltaweave.formats import FactoredRecord, Record, apply_record
from torch import nn

__all__ = ["LOGITS", "Divergence", "Fidelity"]

# Logits held at a time: 2^24 float64 numbers are 128 MiB, of which a few are alive at once.
LOGITS = 1 << 24
# Neighbouring tokens are no independent samples: the standard error is taken over blocks of this many.
BLOCK = 32

Weight = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """KL(fine-tune || base + delta) in nats a token.

    Attributes:
        kl: mean over the text.
        error: its standard error, over pieces of the text.
    """

    kl: float
    error: float


class Fidelity:
    """Measures records of one pair against its fine-tune."""

    def __init__(
        self,
        pair: Pair,
        text: CalibrationData,
        stream: BlockStream,
        workspace: Workspace,
        others: Mapping[str, Record],
        progress: Progress,
    ) -> None:
        """Walks the fine-tune, unless the workspace has what it gave.

        Args:
            pair: the checkpoints.
            text: the held-out tokens, [pieces, length].
            stream: the fine-tune for sequences of that length, in float32.
            workspace: keeps the fine-tune's last hidden states.
            others: records of everything but the projections.
            progress: told how far the work is.
        """
        self.pair, self.text, self.stream, self.others, self.progress = pair, text, stream, others, progress
        self.workspace, self.device = workspace, stream.device
        samples, length = text.tokens.shape
        self.shape = samples, length, int(pair.tuned.config["hidden_size"])
        if not workspace.reference.is_file():
            self._walk(workspace.reference, self._tuned_weight, "walking the fine-tune").save()

    @property
    def described(self) -> dict[str, Any]:
        """The text, for a file's header."""
        samples, length, _ = self.shape
        return {"text": self.text.source, "sha256": self.text.sha256, "pieces": samples, "tokens": samples * length}

    @torch.no_grad()
    def measure(self, records: Mapping[str, Record]) -> Divergence:
        """The KL of the base with `records` of its projections and everything else as the fine-tune's file has it.

        Raises:
            CheckpointError: logits that are no finite numbers, the fine-tune's or its delta's.
        """
        every = {**self.others, **records}

        def weight(name: str) -> torch.Tensor:
            return self._served(name, every.get(name))

        candidate = self._walk(self.workspace.candidate, weight, "measuring KL")
        reference = Activations.load(self.workspace.reference, self.shape, self.stream.dtype, self.device)
        divergences = torch.cat(list(self._divergences(reference, candidate, weight)))
        self.workspace.drop_candidate()
        kl = float(divergences.mean())
        if not math.isfinite(kl):
            raise CheckpointError(
                f"{self.pair.tuned.folder}: KL on {self.text.source} is no number: infinite or NaN logits of the "
                "fine-tune, or of base + delta"
            )
        blocks = torch.stack([block.mean() for block in divergences.split(BLOCK)])
        error = float(blocks.std()) / math.sqrt(len(blocks)) if len(blocks) > 1 else 0.0
        return Divergence(max(0.0, kl), error)

    def _walk(self, path: Path, weight: Weight, what: str) -> Activations:
        """The last block's output, of the model that has `weight`'s projections and embeddings."""
        stream, layers = self.stream, self.pair.layers
        hidden = Activations.create(path, self.shape, stream.dtype, self.device)
        stream.embed(self.text.tokens, hidden, weight(EMBEDDING).float())
        for layer, stages in enumerate(layers):
            self.progress(what, layer, len(layers))
            projections = [projection for stage in stages for projection in stage]
            block = stream.load(layer, without=[projection.weight for projection in projections])
            for projection in projections:
                served = nn.Parameter(weight(projection.weight).to(stream.dtype), requires_grad=False)
                block.get_submodule(projection.module).weight = served
            for rows, values in hidden.chunks():
                hidden.write(rows, stream.forward(layer, values))
            stream.unload(layer)
        return hidden

    def _divergences(self, reference: Activations, candidate: Activations, weight: Weight) -> Iterator[torch.Tensor]:
        """KL of every token that another follows, float64 [tokens] at a time."""
        norm, name = self.stream.final_norm(), self.pair.tuned.resolve(HEAD) or HEAD
        heads = [made(name).to(self.device, self.stream.dtype) for made in (self._tuned_weight, weight)]
        for (_, expected), (_, found) in zip(reference.chunks(), candidate.chunks(), strict=True):
            pairs = [norm(hidden[:, :-1].flatten(0, 1)) for hidden in (expected, found)]
            for pieces in zip(*(hidden.split(max(1, LOGITS // heads[0].shape[0])) for hidden in pairs), strict=True):
                log_expected, log_found = (
                    nn.functional.linear(piece, head).double().log_softmax(-1)
                    for piece, head in zip(pieces, heads, strict=True)
                )
                yield (log_expected.exp() * (log_expected - log_found)).sum(-1).cpu()

    def _tuned_weight(self, name: str) -> torch.Tensor:
        return self.pair.tuned.tensor(name).to(self.device)

    def _served(self, name: str, record: Record | None) -> torch.Tensor:
        """A weight of base + delta, in the fine-tune's dtype as `apply` writes it."""
        base, dtype = self.pair.base, self.pair.tuned.dtype(name)
        origin = base.resolve(name)
        if record is None:
            return base.tensor(origin or name).to(self.device, dtype)
        if isinstance(record, FactoredRecord) and origin:
            u, sigma, v = (torch.tensor(values, device=self.device) for values in record.factors())
            return (base.tensor(origin).to(self.device).float() + u.T @ (sigma[:, None] * v)).to(dtype)
        before = base.tensor(origin).float().numpy() if origin else None
        return torch.from_numpy(apply_record(record, before)).to(self.device, dtype)
