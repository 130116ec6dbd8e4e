# SPDX-License-Identifier: Apache-2.0
"""The table that a user comes for: fine-tune, base and any deltas, by bytes, task accuracy, perplexity and KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaweave.converter import Checkpoint, Progress, require_base
from deltaweave.evaluation.tasks import Task, TaskScore, complete, load_tasks, score_task
from deltaweave.evaluation.text import TextScore, load_text, score_text
from deltaweave.formats import Delta, DeltaweaveError
from deltaweave.models import load_checkpoint, load_tokenizer, load_tuned

__all__ = ["Candidate", "Comparison", "compare"]

BASE, TUNED = "base", "fine-tune"


@dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        name: `base`, `fine-tune`, or the delta's file name.
        method: what made it, as the delta's header says.
        projection_bytes: stored bytes of the projections; None for the base.
        file_bytes: of everything beyond the base; None for the base.
        projection_ratio: `projection_bytes` over the projections' 16-bit bytes.
        file_ratio: `file_bytes` over the fine-tune's bytes.
        text: scores over a text, if one was given.
        task: score over a task, if one was given.
        samples: what it answers to the sample prompts.
    """

    name: str
    method: str
    projection_bytes: int | None
    file_bytes: int | None
    projection_ratio: float | None
    file_ratio: float | None
    text: TextScore | None
    task: TaskScore | None
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All rows, over one pair.

    Attributes:
        base: the base's name.
        tuned: the fine-tune's name.
        prompts: the sample prompts.
        candidates: base, fine-tune, then deltas as given.
    """

    base: str
    tuned: str
    prompts: tuple[Task, ...]
    candidates: tuple[Candidate, ...]

    def __getitem__(self, name: str) -> Candidate:
        """The row of that name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def gain_kept(self, candidate: Candidate) -> float | None:
        """Share of the fine-tune's gain in task accuracy over the base that a candidate keeps."""
        base, tuned = self[BASE].task, self[TUNED].task
        if candidate.task is None or base is None or tuned is None or tuned.accuracy == base.accuracy:
            return None
        return (candidate.task.accuracy - base.accuracy) / (tuned.accuracy - base.accuracy)

    def to_json(self) -> dict[str, Any]:
        """All numbers, for machines."""
        rows = []
        for candidate in self.candidates:
            row = asdict(candidate)
            if candidate.task is not None:
                row["task"] |= {"accuracy": candidate.task.accuracy, "interval": candidate.task.interval}
            rows.append({**row, "gain_kept": self.gain_kept(candidate)})
        return {
            "base": self.base,
            "tuned": self.tuned,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "candidates": rows,
        }


def compare(
    base: str | Path,
    tuned: str | Path,
    deltas: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    tasks: str | Path | None = None,
    sequence_length: int = 256,
    sequences: int = 64,
    task_limit: int | None = None,
    sample_count: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    accept_base: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Scores base, fine-tune and deltas alike.

    Two models are in memory at a time: the fine-tune and the candidate.

    Args:
        base: Hugging Face folder.
        tuned: Hugging Face folder.
        deltas: delta files of this base.
        text: UTF-8 text for perplexity and KL.
        tasks: JSONL of `prompt` and `answer` for accuracy.
        sequence_length: tokens per sequence of `text`.
        sequences: how many sequences of `text` are used at most.
        task_limit: how many tasks are used at most.
        sample_count: tasks whose answers are shown side by side.
        dtype: of the arithmetic.
        device: None takes the GPU if there is one.
        accept_base: take a base whose fingerprint is not the deltas'.
        progress: told how far the work is.

    Raises:
        CheckpointError: a delta of another base.
        DeltaweaveError: unusable inputs.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint, tuned_checkpoint = Checkpoint.open(base), Checkpoint.open(tuned)
    opened = [Delta.open(path) for path in deltas]
    _require_distinct([_name(delta) for delta in opened])
    for delta in opened:
        require_base(checkpoint, delta, accept=accept_base)
    tokenizer = load_tokenizer(tuned)
    task_list = load_tasks(tasks, task_limit) if tasks else []
    scorer = _Scorer(
        reference=load_checkpoint(tuned, dtype).to(place),
        tokenizer=tokenizer,
        tokens=load_text(text, tokenizer, sequence_length, sequences) if text else None,
        tasks=task_list,
        prompts=tuple(task_list[:sample_count]),
    )
    rows: list[Candidate] = []
    loaders = _loaders(checkpoint, tuned_checkpoint, opened, scorer.reference, dtype)
    for done, (row, load) in enumerate(loaders):
        if progress:
            progress("comparing models", done, len(opened) + 2)
        rows.append(scorer.score(row, load().to(place)))
    return Comparison(checkpoint.display_name, tuned_checkpoint.display_name, scorer.prompts, tuple(rows))


def _name(delta: Delta) -> str:
    return delta.path.name.removesuffix(".index.json").removesuffix(".safetensors")


def _require_distinct(names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in (BASE, TUNED) or name in names[:index]:
            raise DeltaweaveError(f"{name}: two rows of the comparison would have this name; rename the delta file")


Loader = Callable[[], PreTrainedModel]


def _loaders(
    base: Checkpoint, tuned: Checkpoint, deltas: Sequence[Delta], reference: PreTrainedModel, dtype: torch.dtype
) -> Iterator[tuple[Candidate, Loader]]:
    """Every row without scores, and what loads its model when its turn comes."""
    empty: dict[str, Any] = {"text": None, "task": None, "samples": ()}
    vocabulary = int(reference.config.vocab_size)
    yield Candidate(BASE, "", None, None, None, None, **empty), lambda: load_checkpoint(base.folder, dtype, vocabulary)
    yield Candidate(TUNED, "16 bit", None, tuned.tensor_bytes, 1.0, 1.0, **empty), lambda: reference
    for delta in deltas:
        count, header = delta.byte_count(), delta.header
        row = Candidate(
            name=_name(delta),
            method=str(header.method["name"]),
            projection_bytes=count.projections,
            file_bytes=count.file,
            projection_ratio=count.projections / count.tuned_projections if count.tuned_projections else None,
            file_ratio=count.file / header.tuned.bytes,
            **empty,
        )
        yield row, lambda delta=delta: load_tuned(base, delta, dtype)  # type: ignore[misc]


@dataclass(frozen=True)
class _Scorer:
    """What is asked of every candidate."""

    reference: PreTrainedModel
    tokenizer: Any
    tokens: torch.Tensor | None
    tasks: Sequence[Task]
    prompts: tuple[Task, ...]

    def score(self, row: Candidate, model: PreTrainedModel) -> Candidate:
        text = None if self.tokens is None else score_text(self.reference, model, self.tokens)
        task = score_task(model, self.tokenizer, self.tasks) if self.tasks else None
        return Candidate(**{**_fields(row), "text": text, "task": task, "samples": self._samples(model)})

    def _samples(self, model: PreTrainedModel) -> tuple[str, ...]:
        if not self.prompts:
            return ()
        longest = max(len(self.tokenizer(task.answer)["input_ids"]) for task in self.prompts)
        return tuple(complete(model, self.tokenizer, [task.prompt for task in self.prompts], longest + 8))


def _fields(row: Candidate) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}
