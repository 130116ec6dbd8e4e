# SPDX-License-Identifier: Apache-2.0
"""From folders and files to fusion files: gates that are trained, and the baselines without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from deltaweave.converter import Checkpoint, Progress
from deltaweave.converter.workspace import output_folder
from deltaweave.formats import Architecture, BaseIdentity
from deltaweave.formats.fusion import FixedGate, Fusion, TokenGate
from deltaweave.formats.fusion_file import write_fusion
from deltaweave.gates.baselines import HubRecipe, HubSearch, average_weights, search_weights, single_weights
from deltaweave.gates.examples import ExampleSet, load_examples
from deltaweave.gates.experts import Expert, GateError, open_experts
from deltaweave.gates.training import GateRecipe, GateTraining, train_gates
from deltaweave.models import load_checkpoint, load_tokenizer

__all__ = ["BASELINES", "Baseline", "DataOptions", "Parts", "build_baseline", "build_gates"]

Baseline = Literal["average", "lorahub", "single"]
BASELINES: tuple[Baseline, ...] = ("average", "lorahub", "single")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DataOptions:
    """Which examples, and how they are read.

    Attributes:
        train: JSONL.
        dev: JSONL of examples to choose the epoch by; None for none.
        dev_share: share of `train` to set apart for that instead; 0 for none.
        chat: wrap prompts in the chat template.
        max_length: longer examples are left out.
    """

    train: Path
    dev: Path | None = None
    dev_share: float = 0.0
    chat: bool = False
    max_length: int = 2048

    def load(self, tokenizer: Any, seed: int) -> tuple[ExampleSet, ExampleSet | None]:
        """Training and dev examples.

        Raises:
            GateError: unreadable data, or both kinds of dev examples asked for.
        """
        if self.dev is not None and self.dev_share:
            raise GateError("dev examples come from a file or from a share of the training data, not from both")
        examples = load_examples(self.train, tokenizer, chat=self.chat, max_length=self.max_length)
        if self.dev is not None:
            return examples, load_examples(self.dev, tokenizer, chat=self.chat, max_length=self.max_length)
        return examples.split(self.dev_share, seed) if self.dev_share else (examples, None)


@dataclass(frozen=True)
class Parts:
    """A base and the experts on it, opened and checked.

    Attributes:
        base: the checkpoint.
        identity: its digests.
        experts: in the gate's order.
        output: the fusion file to write.
    """

    base: Checkpoint
    identity: BaseIdentity
    experts: list[Expert]
    output: Path

    @classmethod
    def open(
        cls,
        base: str | Path,
        experts: Sequence[str | Path],
        output: str | Path,
        *,
        reference: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Parts:
        """Opens what a fusion is made of.

        Args:
            base: Hugging Face folder.
            experts: see `open_experts`.
            output: the fusion file.
            reference: name LoRA files instead of copying them.
            force: replace an existing output.
            progress: told how far the hashing of the base is.

        Raises:
            DeltaweaveError: the output exists, or a part that is unreadable or does not belong.
        """
        output = Path(output)
        folder = output_folder(output, force=force)
        checkpoint = Checkpoint.open(base)
        report = progress or (lambda *_: None)
        identity = checkpoint.identity(lambda done, total: report("hashing the base", done, total))
        return cls(checkpoint, identity, open_experts(experts, identity, folder, reference=reference), output)

    def index(self, name: str | None) -> int:
        """The expert of a name; the last without one.

        Raises:
            GateError: no such expert.
        """
        names = [expert.lora.name for expert in self.experts]
        if name is None:
            return len(names) - 1
        if name not in names:
            raise GateError(f"expert {name!r}, expected one of {', '.join(names)}")
        return names.index(name)

    def model(self, dtype: str, device: str | None) -> Any:
        """The base in memory; `dtype` is fp32 or bf16, `device` None takes the GPU if there is one."""
        model = load_checkpoint(self.base.folder, DTYPES[dtype])
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def write(
        self,
        gate: FixedGate | TokenGate,
        method: dict[str, Any],
        training: dict[str, Any] | None,
        *,
        force: bool = False,
    ) -> Path:
        """Writes the fusion file."""
        fusion = Fusion(
            tool=f"deltaweave {version('deltaweave')}",
            base=self.identity,
            architecture=Architecture(self.base.model_type, self.base.tied),
            method=method,
            experts=tuple(expert.stored for expert in self.experts),
            gate=gate,
            training=training,
        )
        return write_fusion(self.output, fusion, force=force)


def build_gates(
    parts: Parts,
    data: DataOptions,
    recipe: GateRecipe,
    *,
    task: str | None = None,
    dtype: str = "fp32",
    device: str | None = None,
    checkpointing: bool = False,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> GateTraining:
    """Trains gates and writes the fusion; unfinished work lies in `OUTPUT.partial` and is resumed by the same call.

    Args:
        parts: base, experts, output.
        data: examples.
        recipe: how.
        task: name of the expert that is on at the start; the last by default.
        dtype: `fp32` or `bf16`, of base and experts in memory; gates are float32.
        device: None takes the GPU if there is one.
        checkpointing: less memory for more time.
        force: replace an existing output.
        restart: discard unfinished work instead of resuming it.
        progress: told how far the work is.

    Raises:
        DeltaweaveError: bad data, experts or options, as one line.
    """
    tokenizer = load_tokenizer(parts.base.folder)
    examples, dev = data.load(tokenizer, recipe.seed)
    state = parts.output.with_name(parts.output.name + ".partial")
    if restart:
        state.unlink(missing_ok=True)
    started_on = parts.index(task)
    described = {"train": examples.describe(), "dev": dev.describe() if dev else None, "chat": data.chat}
    model = parts.model(dtype, device)
    key = {
        "base": parts.identity.root,
        "experts": [expert.digest() for expert in parts.experts],
        "data": described | {"max_length": data.max_length},
        "task": started_on,
        "dtype": dtype,
        "device": model.device.type,
    }
    trained = train_gates(
        model,
        [expert.lora for expert in parts.experts],
        examples,
        recipe,
        task=started_on,
        dev=dev,
        pad=_pad(tokenizer),
        checkpointing=checkpointing,
        state=state,
        key=key,
        progress=progress,
    )
    method = {"name": "lora-flow", **asdict(recipe), "learning_rate": recipe.peak_rate, "dtype": dtype}
    method["task"] = parts.experts[started_on].lora.name
    parts.write(trained.weights.gate(), method, {**described, **trained.describe()}, force=force)
    state.unlink(missing_ok=True)
    return trained


def build_baseline(
    parts: Parts,
    kind: Baseline,
    *,
    task: str | None = None,
    data: DataOptions | None = None,
    recipe: HubRecipe | None = None,
    dtype: str = "fp32",
    device: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """Writes a fusion with fixed weights and returns them.

    Args:
        parts: base, experts, output.
        kind: `average`; `single`, the expert `task` alone; `lorahub`, weights searched on `data`.
        task: an expert's name; the last by default.
        data: examples, for `lorahub`.
        recipe: of that search.
        dtype: `fp32` or `bf16`, for the search.
        device: None takes the GPU if there is one.
        force: replace an existing output.
        progress: told how far the search is.

    Raises:
        DeltaweaveError: bad experts or options, as one line.
    """
    count = len(parts.experts)
    if kind == "lorahub":
        if data is None:
            raise GateError("lorahub searches its weights on examples: --data is missing")
        recipe = recipe or HubRecipe()
        found, described = _search(parts, data, recipe, dtype, device, progress)
        method = {"name": "lorahub", **asdict(recipe), "dtype": dtype, "objective": round(found.objective, 6)}
        parts.write(FixedGate(found.weights), method, described, force=force)
        return found.weights
    weights = average_weights(count) if kind == "average" else single_weights(count, parts.index(task))
    parts.write(FixedGate(weights), {"name": kind}, None, force=force)
    return weights


def _search(
    parts: Parts, data: DataOptions, recipe: HubRecipe, dtype: str, device: str | None, progress: Progress | None
) -> tuple[HubSearch, dict[str, Any]]:
    tokenizer = load_tokenizer(parts.base.folder)
    examples, _ = data.load(tokenizer, recipe.seed)
    loras = [expert.lora for expert in parts.experts]
    model = parts.model(dtype, device)
    found = search_weights(model, loras, examples, recipe, pad=_pad(tokenizer), progress=progress)
    return found, {"train": examples.describe(), "chat": data.chat}


def _pad(tokenizer: Any) -> int:
    """A token to fill rows up with; it is masked, so any will do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
