# SPDX-License-Identifier: Apache-2.0
"""From files to a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from deltaweave.converter import Checkpoint, Progress, require_base, require_identity
from deltaweave.formats import Delta, DeltaweaveError, Fusion, open_tenant
from deltaweave.models import load_checkpoint, load_tokenizer
from deltaweave.runtime_plugin.pytorch import Arena, attach
from deltaweave.serving import room_for
from deltaweave.validation.measure import Measurement, measure
from deltaweave.validation.prompts import Prompt, load_prompts, tokenize
from deltaweave.validation.subject import EngineSubject, ModelSubject, Subject
from deltaweave.validation.thresholds import METRICS, REFERENCES, Check, Reference, Thresholds

__all__ = ["DTYPES", "HOSTS", "Dtype", "Host", "Validation", "validate", "validate_subject"]

Host = Literal["attach", "arena"]
HOSTS: tuple[Host, ...] = ("attach", "arena")
Dtype = Literal["float16", "bfloat16", "float32"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TENANT = "validated"
SLOTS = 9  # a fusion and its experts


@dataclass(frozen=True)
class Validation:
    """What was measured, and what it was held against.

    Attributes:
        subject: its name, the delta's file with what ran it.
        tuned: the fine-tune's name.
        prompts: what was asked.
        measurements: by the reference's dtype.
        texts: by the reference's dtype, each prompt's greedy text: (the fine-tune's, the subject's).
        checks: limits, if there are any.
    """

    subject: str
    tuned: str
    prompts: tuple[Prompt, ...]
    measurements: Mapping[Reference, Measurement]
    texts: Mapping[Reference, tuple[tuple[str, str], ...]]
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        """Limits that are not kept."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return not self.broken

    def metrics(self, reference: Reference) -> dict[str, float | None]:
        """Every metric against one reference, by name; None where it cannot be measured."""
        return {name: metric.of(self.measurements[reference]) for name, metric in METRICS.items()}

    def to_json(self) -> dict[str, Any]:
        """All numbers, for machines; what is infinite or not a number is null."""
        content = {
            "subject": self.subject,
            "tuned": self.tuned,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "references": {name: self._measured(name) for name in self.measurements},
        }
        return _finite(content)  # type: ignore[no-any-return]

    def _measured(self, reference: Reference) -> dict[str, Any]:
        measured = self.measurements[reference]
        prompts = [
            {
                **asdict(score.text),
                "reference_perplexity": score.reference_perplexity,
                "divergence": score.divergence,
                "prompt": prompt.prompt,
                "expected": expected,
                "found": found,
            }
            for prompt, score, (expected, found) in zip(
                self.prompts, measured.prompts, self.texts[reference], strict=True
            )
        ]
        return {
            "metrics": self.metrics(reference),
            "tokens": measured.text.tokens,
            "kl_error": measured.text.kl_error,
            "perplexity": measured.text.perplexity,
            "reference_perplexity": measured.reference_perplexity,
            "layers": list(measured.layers),
            "prompts": prompts,
        }


def validate(
    delta: str | Path,
    *,
    tuned: str | Path,
    prompts: str | Path,
    base: str | Path | None = None,
    engine: str | Path | None = None,
    thresholds: Thresholds | str | Path | None = None,
    references: Sequence[Reference] | None = None,
    dtype: Dtype | None = None,
    host: Host | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
    chat: bool = False,
    device: str | None = None,
    accept_base: bool = False,
    progress: Progress | None = None,
) -> Validation:
    """Measures base + delta, in PyTorch or in an engine, against the fine-tune that the delta was made from.

    A fusion, which is made from no fine-tune, is held against itself by the reference ops on the base.

    Args:
        delta: the delta or fusion file.
        tuned: Hugging Face folder of the fine-tune, the reference; of a fusion the base's.
        prompts: JSONL of `prompt` and, if wanted, `answer`.
        base: Hugging Face folder of the base, for PyTorch.
        engine: TensorRT engine folder, instead of `base`.
        thresholds: limits, or the YAML file that has them.
        references: dtypes of the fine-tune; None for those that the thresholds name, or else for both (float16 for an
            engine).
        dtype: of base + delta in PyTorch; None for float16.
        host: in PyTorch `attach` (None) computes the delta by the reference op, `arena` by libdeltaweave, as it is
            served (on a CPU: by plain torch over the arena).
        max_new_tokens: of greedy decoding.
        limit: of prompts.
        chat: wrap prompts in the fine-tune's chat template.
        device: None takes the GPU if there is one.
        accept_base: take a base whose fingerprint is not the delta's.
        progress: told how far the work is.

    Raises:
        DeltaweaveError: unusable inputs, another base, or a threshold of what is not measured.
    """
    if (base is None) == (engine is None):
        raise DeltaweaveError("expected a base folder or an engine folder, and not both")
    if engine is not None and (dtype or host):
        raise DeltaweaveError("dtype and host are of PyTorch; an engine has its own")
    limits = _limits(thresholds)  # what is wrong with the small files is told before models are loaded
    load_prompts(prompts, limit)
    place = _device(device)
    with open_tenant(delta) as opened:
        if base is not None:
            name = f"{Path(delta).name} ({host or 'attach'}, {dtype or 'float16'})"
            hosted = _hosted(base, opened, tuned, DTYPES[dtype or "float16"], place, host or "attach", accept_base)
        else:
            assert engine is not None
            name, hosted = f"{Path(delta).name} ({Path(engine).name})", _engine(engine, opened, accept_base)
            references = references or (None if limits else REFERENCES[:1])
        with hosted as subject:
            return validate_subject(
                subject,
                name,
                tuned=tuned,
                fusion=opened if isinstance(opened, Fusion) else None,
                prompts=prompts,
                thresholds=limits,
                references=references,
                max_new_tokens=max_new_tokens,
                limit=limit,
                chat=chat,
                device=device,
                progress=progress,
            )


def validate_subject(
    subject: Subject,
    name: str,
    *,
    tuned: str | Path,
    prompts: str | Path,
    fusion: Fusion | None = None,
    thresholds: Thresholds | str | Path | None = None,
    references: Sequence[Reference] | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
    chat: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measures anything that stands in for a fine-tune, in whatever runtime; arguments as in `validate`.

    Args:
        subject: gives logits and greedy text.
        name: what reports call it.
        tuned: Hugging Face folder of the fine-tune, the reference.
        prompts: JSONL of `prompt` and, if wanted, `answer`.
        fusion: attached to the model of `tuned`, by the reference ops.
        thresholds: limits, or the YAML file that has them.
        references: dtypes of the fine-tune; None for those that the thresholds name, or for both.
        max_new_tokens: of greedy decoding.
        limit: of prompts.
        chat: wrap prompts in the fine-tune's chat template.
        device: of the reference; None takes the GPU if there is one.
        progress: told how far the work is.

    Raises:
        DeltaweaveError: unusable inputs, or a threshold of what is not measured.
    """
    if max_new_tokens < 1:
        raise DeltaweaveError(f"max_new_tokens {max_new_tokens}, expected at least 1")
    limits, place = _limits(thresholds), _device(device)
    chosen = _references(limits, references)
    asked, tokenizer = load_prompts(prompts, limit), load_tokenizer(tuned)
    rows = tokenize(tokenizer, asked, chat)
    measurements: dict[Reference, Measurement] = {}
    for reference in chosen:  # one after the other: there are two models in memory, never three
        model = load_checkpoint(tuned, DTYPES[reference]).to(place)
        counter = _Counter(f"against {reference}", len(rows), progress)
        stop = _stop_tokens(model, tokenizer)
        with nullcontext() if fusion is None else attach(model, fusion, accept_base=True):
            expected = ModelSubject(model)
            measurements[reference] = measure(expected, subject, rows, max_new_tokens, stop, counter.advance)
        del model
    return Validation(
        subject=name,
        tuned=Checkpoint.open(tuned).display_name,
        prompts=tuple(asked),
        measurements=measurements,
        texts={reference: _texts(tokenizer, found) for reference, found in measurements.items()},
        checks=tuple(
            check for reference, found in measurements.items() if limits for check in limits.check(reference, found)
        ),
    )


def _limits(thresholds: Thresholds | str | Path | None) -> Thresholds | None:
    if thresholds is None or isinstance(thresholds, Thresholds):
        return thresholds
    return Thresholds.from_yaml(thresholds)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _references(limits: Thresholds | None, wanted: Sequence[Reference] | None) -> tuple[Reference, ...]:
    """The references to be measured: no limit may go unmeasured."""
    limited = tuple(name for name in REFERENCES if limits and limits.limits(name))
    chosen = tuple(wanted or limited or REFERENCES)
    for name in limited:
        if name not in chosen:
            raise DeltaweaveError(f"the thresholds have limits against {name}, which is not among the references")
    return chosen


@contextmanager
def _hosted(
    base: str | Path,
    source: Delta | Fusion,
    tuned: str | Path,
    dtype: torch.dtype,
    place: torch.device,
    host: Host,
    accept_base: bool,
) -> Iterator[Subject]:
    """Base + delta, or a fusion on the base, in PyTorch."""
    checkpoint = Checkpoint.open(base)
    if isinstance(source, Fusion):
        require_identity(checkpoint, source.base, "the fusion", accept=accept_base)
    else:
        require_base(checkpoint, source, accept=accept_base)
    model = load_checkpoint(base, dtype).to(place)
    if host == "attach":
        with attach(model, source, accept_base=True):  # the base was checked above
            yield ModelSubject(model)
        return
    vocabulary = max(int(config.get("vocab_size", 0)) for config in (checkpoint.config, Checkpoint.open(tuned).config))
    arena = Arena.for_model(model, capacity_bytes=room_for(source), slots=SLOTS, vocabulary=vocabulary)
    arena.add(source, TENANT, accept_base=True)
    with attach(model, arena) as served:
        yield ModelSubject(model, lambda rows: served.step([TENANT] * rows))


@contextmanager
def _engine(folder: str | Path, source: Delta | Fusion, accept_base: bool) -> Iterator[Subject]:
    """A fine-tune or fusion in a TensorRT engine, whose packages are needed here alone."""
    try:
        from deltaweave.runtime_plugin.trt.engine import Engine
    except ImportError as error:
        raise DeltaweaveError(f"engines need {error.name}: pip install 'deltaweave[tensorrt]'") from error
    with Engine(folder) as engine:
        engine.add(source, TENANT, accept_base=accept_base)
        yield EngineSubject(engine, TENANT)


def _stop_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end the fine-tune's texts, by its own generation settings or else its tokenizer."""
    own = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if own is None else own
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def _texts(tokenizer: Any, measured: Measurement) -> tuple[tuple[str, str], ...]:
    return tuple((tokenizer.decode(score.expected), tokenizer.decode(score.found)) for score in measured.prompts)


class _Counter:
    """Reports prompts as they are done."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self._name, self._total, self._progress, self._done = name, total, progress, 0

    def advance(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._name, self._done, self._total)


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
