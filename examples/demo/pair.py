# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's pair on the CPU: a small Llama that tells stories, and a full fine-tune of it with four new skills.

    python examples/demo/pair.py OUT --seed 0

Training runs by fixed steps in float32, so a seed gives the same pair on the same machine, versions and thread count.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import Corpus, Problem, character_tokenizer
from deltaweave.formats import DeltaweaveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from deltaweave.evaluation.tasks import load_tasks, score_task

__all__ = ["Pair", "PairError", "PairSettings", "Stage", "make_pair"]

# Written last: a folder that holds it is complete.
RECEIPT = "pair.json"
CALIBRATION_LINES = 4000


class PairError(DeltaweaveError):
    """Training that missed its stated target."""


@dataclass(frozen=True)
class Stage:
    """One training by fixed steps.

    Attributes:
        steps: how many.
        stories: rows of a batch that are stories; the others are packed problems.
        learning_rate: the highest, after the warm-up.
    """

    steps: int
    stories: int
    learning_rate: float


@dataclass(frozen=True)
class PairSettings:
    """Everything but the seed that decides what a pair becomes.

    Attributes:
        hidden_size, intermediate_size, layers, heads: the model's shape.
        initializer_range: spread of the first weights; more than Transformers' 0.02, with which skills come late.
        rope_theta: small, so that within rows this short most angles still tell positions apart.
        sequence_length: tokens a training row; texts are best scored in rows of this length.
        batch: rows a step.
        warmup: steps in which the learning rate rises.
        base, tuned: the two trainings.
        held_out: problems for the task score, and stories for the perplexity.
        target: lowest accuracy of the fine-tune on the held-out problems.
    """

    hidden_size: int = 384
    intermediate_size: int = 1024
    layers: int = 3
    heads: int = 6
    initializer_range: float = 0.03
    rope_theta: float = 100.0
    sequence_length: int = 64
    batch: int = 32
    warmup: int = 20
    base: Stage = Stage(steps=90, stories=16, learning_rate=2e-3)
    tuned: Stage = Stage(steps=230, stories=3, learning_rate=1.2e-3)
    held_out: int = 400
    target: float = 0.9


@dataclass(frozen=True)
class Pair:
    """A trained pair.

    Attributes:
        base, tuned: Hugging Face folders, bf16.
        tasks: held-out problems, JSONL lines with `prompt` and `answer`.
        text: held-out stories, one a line.
        calibration: stories and solved problems that are not held out.
        base_accuracy, tuned_accuracy: exact matches over `tasks`.
        seconds: training time of both.
    """

    base: Path
    tuned: Path
    tasks: Path
    text: Path
    calibration: Path
    base_accuracy: float
    tuned_accuracy: float
    seconds: float


@dataclass(frozen=True)
class _Outcome:
    base_accuracy: float
    tuned_accuracy: float
    seconds: float


def make_pair(folder: Path, seed: int = 0, settings: PairSettings | None = None, *, show_progress: bool = True) -> Pair:
    """Trains a pair into `folder`, or takes the one there if its seed and settings are the same.

    Raises:
        PairError: the fine-tune misses `settings.target`; such a folder is never reused.
    """
    settings = settings or PairSettings()
    receipt, key = folder / RECEIPT, {"seed": seed, "settings": asdict(settings)}
    outcome = _earlier_outcome(receipt, key)
    if outcome is None:
        folder.mkdir(parents=True, exist_ok=True)
        receipt.unlink(missing_ok=True)
        # Training must neither depend on the caller's random numbers nor disturb them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outcome = _make(folder, seed, settings, show_progress)
        receipt.write_text(json.dumps({**key, "outcome": asdict(outcome)}, indent=2) + "\n", encoding="utf-8")
    return _pair(folder, outcome)


def _earlier_outcome(receipt: Path, key: dict[str, object]) -> _Outcome | None:
    try:
        found = json.loads(receipt.read_text(encoding="utf-8"))
        outcome = _Outcome(**found.pop("outcome"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return outcome if found == key else None


def _pair(folder: Path, outcome: _Outcome) -> Pair:
    return Pair(
        base=folder / "base",
        tuned=folder / "tuned",
        tasks=folder / "tasks.jsonl",
        text=folder / "text.txt",
        calibration=folder / "calibration.txt",
        **asdict(outcome),
    )


def _make(folder: Path, seed: int, settings: PairSettings, show_progress: bool) -> _Outcome:
    tokenizer = character_tokenizer()
    corpus = Corpus(tokenizer, settings.held_out, seed)
    paths = _pair(folder, _Outcome(math.nan, math.nan, math.nan))
    _write_texts(paths, corpus)
    started = time.monotonic()
    with _progress(show_progress) as progress:
        model = _new_model(settings, tokenizer)
        losses = _train(model, corpus, corpus.sum, settings.base, settings)
        _follow(losses, progress, "training the base", settings.base.steps)
        base = _save(model, tokenizer, paths.base)
        # The fine-tune starts from the rounded weights: they are the base that everybody else will see.
        model = copy.deepcopy(base)
        losses = _train(model, corpus, corpus.problem, settings.tuned, settings)
        _follow(losses, progress, "training the fine-tune", settings.tuned.steps)
        tuned = _save(model, tokenizer, paths.tuned)
    seconds = round(time.monotonic() - started, 1)
    tasks = load_tasks(paths.tasks)
    accuracy = score_task(tuned, tokenizer, tasks).accuracy
    if accuracy < settings.target:
        raise PairError(
            f"{paths.tuned}: solves {accuracy:.1%} of the held-out problems after {settings.tuned.steps} steps "
            f"of seed {seed}, expected at least {settings.target:.0%}"
        )
    return _Outcome(score_task(base, tokenizer, tasks).accuracy, accuracy, seconds)


def _write_texts(paths: Pair, corpus: Corpus) -> None:
    problems = "".join(json.dumps(asdict(problem)) + "\n" for problem in corpus.problems)
    paths.tasks.write_text(problems, encoding="utf-8")
    paths.text.write_text("\n".join(corpus.stories) + "\n", encoding="utf-8")
    paths.calibration.write_text("\n".join(corpus.lines(CALIBRATION_LINES)) + "\n", encoding="utf-8")


def _new_model(settings: PairSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4 * settings.sequence_length,
        initializer_range=settings.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _train(
    model: PreTrainedModel, corpus: Corpus, problem: Callable[[], Problem], stage: Stage, settings: PairSettings
) -> Iterator[float]:
    """AdamW over every weight: a warm-up, a plateau, then a straight fall to zero over the last 60 % of the steps.

    Yields:
        every step's loss.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warmup, (stage.steps - step) / (0.6 * stage.steps))
    )
    for _ in range(stage.steps):
        tokens, targets = corpus.batch(problem, settings.batch, stage.stories, settings.sequence_length)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _progress(visible: bool) -> Progress:
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not visible)


def _follow(losses: Iterator[float], progress: Progress, description: str, steps: int) -> None:
    bar = progress.add_task(description, total=steps, loss=math.nan)
    for loss in losses:
        progress.update(bar, advance=1, loss=loss)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """Saves in bf16, as real checkpoints are; returns the model with its weights so rounded, in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.float().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo's pair.")
    parser.add_argument("out", type=Path, help="folder for the pair and its texts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    try:
        pair = make_pair(arguments.out, arguments.seed)
    except DeltaweaveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{pair.base} solves {pair.base_accuracy:.1%} of the held-out problems")
    print(f"{pair.tuned} solves {pair.tuned_accuracy:.1%}, after {pair.seconds:.0f} seconds of training in all")


if __name__ == "__main__":
    main()
