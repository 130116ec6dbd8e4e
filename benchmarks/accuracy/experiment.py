# SPDX-License-Identifier: Apache-2.0
"""What is left of real fine-tunes of SmolLM2-135M at every method and ratio: accuracy, perplexity, KL, bytes.

    python benchmarks/accuracy/experiment.py --base DIR --folder WORK --output benchmarks/results/accuracy.json

A cell is a fine-tune, or one method at one ratio for one fine-tune; finished cells are files in WORK, and the same
command goes on from there. A process decomposes a fine-tune's delta once for all its cells, and what its vectors are
worth is measured once. Processes can share the work (`--tunings german`, `--seeds 1`, ...); the command above at last
gathers everything. Cells that matter most come first, and `--seconds` ends the run between two cells.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from cells import Work
from compression_cache import CompressionCache
from deltaweave.converter import (
    BitDeltaOptions,
    Checkpoint,
    CompressionOptions,
    Policies,
    Recipe,
    compress,
    compress_bitdelta,
    tuned_names,
    tuned_tensor,
)
from deltaweave.formats import Delta, DenseRecord, FactoredRecord, record_bytes
from finetune import encode, replies, score_answers
from problems import SKILLS, Item
from report import bits_of, print_tables, save_plots, summary
from results_file import circumstances, write_result
from tuning import TUNINGS, Tuning, spectrum, tune, write_calibration

from deltaweave.models import load_checkpoint, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "fusion"))
from tasks import items

CAVEAT = (
    "SmolLM2-135M-Instruct, dequantized from a 4-bit file, and fine-tunes of it on generated tasks: the papers' "
    "results with 7B models are not reproduced by this. Its widths 576 and 192 are no multiples of 128; models are "
    "scored as base + delta in dense form."
)
# In the order in which they are worth their time.
CELLS = (
    ("triple", 16), ("corrected", 16), ("optimal", 16), ("corrected", 32), ("optimal", 32), ("triple", 32),
    ("low-rank", 16), ("bitdelta", 16), ("nearest", 16), ("optimal", 64), ("optimal", 8), ("triple", 8), ("triple", 64),
    ("corrected", 8), ("corrected", 64), ("low-rank", 8), ("low-rank", 32), ("nearest", 32), ("low-rank", 64),
    ("nearest", 8), ("nearest", 64), ("double", 16), ("single", 16), ("double", 32), ("single", 32), ("double", 8),
    ("single", 8), ("double", 64), ("single", 64),
)  # fmt: skip
ABLATIONS: dict[str, dict[str, Any]] = {
    "corrected, drift not corrected": {"correct_drift": False},
    "corrected, not unbiased": {"unbiased": False},
    "optimal, drift not corrected": {"correct_drift": False},
    "optimal, target not corrected": {"correct_target": False, "correct_drift": False},
    "optimal, not unbiased": {"unbiased": False},
    "optimal, sensitivity fisher": {"sensitivity": "fisher"},
    "optimal, sensitivity output": {"sensitivity": "output"},
    "optimal, sensitivity weight": {"sensitivity": "weight"},
    "triple, target corrected": {"correct_target": True},
    "triple, unbiased": {"unbiased": True},
    "optimal, whitened": {"whiten": True},
    "optimal, fitted grids": {"grid": "squared-error"},
    "optimal, widths 1 2 3 4 8": {"widths": [1, 2, 3, 4, 8]},
}
RATIOS = (16, 32, 8, 64)
SEQUENCE_LENGTH = 256
BATCH = 1024


def main() -> None:
    arguments = _arguments()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = Work(arguments.folder, arguments.seconds)
    found: dict[str, dict[str, Any]] = {}
    lab = None
    for seed in arguments.seeds:
        for name in arguments.tunings:
            if lab is None and arguments.seconds > 0:
                lab = Laboratory(arguments, device)
            found |= _tuning_cells(work, lab, name, seed, arguments)
    result = {
        **circumstances(device),
        "caveat": CAVEAT,
        "settings": {"items": arguments.items, "tunings": {name: vars(tuning) for name, tuning in TUNINGS.items()}},
        "cells": found,
        "summary": summary(found, arguments.items),
    }
    write_result(arguments.output, result)
    print_tables(result)
    if arguments.output is not None:
        save_plots(result, arguments.output.with_suffix(""))


def _tuning_cells(
    work: Work, lab: Laboratory | None, name: str, seed: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All cells of one fine-tune, by `NAME SEED METHOD 1/RATIO`."""
    prefix, found = f"{name} {seed}", {}

    def cell(kind: str, make: Any) -> None:
        result = work.cell(f"{prefix} {kind}".replace("/", "_"), make)
        if result is not None:
            found[f"{prefix} {kind}"] = result

    bench = FineTune(lab, arguments.folder / f"{name}-{seed}", arguments.smoke or TUNINGS[name], seed)
    cell("tuned", bench.make)
    if f"{prefix} tuned" not in found:
        return found
    cell("base", bench.score_base)
    for method, inverse in [] if arguments.tune_only else _wanted(arguments):
        changes = ABLATIONS.get(method, {})
        cell(f"{method} 1/{inverse}", lambda m=method, i=inverse, c=changes: bench.score_method(m, i, c))
    return found


def _wanted(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """The methods and inverse ratios that are asked for, in order."""
    ratios = arguments.ratios or RATIOS
    if arguments.methods:
        return [(method, inverse) for inverse in ratios for method in arguments.methods]
    wanted = [(method, inverse) for method, inverse in CELLS if inverse in ratios]
    return wanted + [(method, 16) for method in ABLATIONS] if arguments.ablations else wanted


class Laboratory:
    """What all fine-tunes share: the base, its tokenizer, room for one model in memory."""

    def __init__(self, arguments: argparse.Namespace, device: str) -> None:
        self.base, self.device, self.count, self.new_tokens = (
            arguments.base, device, arguments.items, arguments.new_tokens,
        )  # fmt: skip
        self.samples = arguments.samples
        self.scale = 8 if arguments.smoke else 1  # a tiny model has no rank to spare at 1/16
        self.tokenizer = load_tokenizer(arguments.base)

    def model(self, folder: Path) -> Any:
        """A checkpoint ready to answer."""
        return load_checkpoint(folder, torch.float32).to(self.device).eval()


class FineTune:
    """One fine-tune and everything that is measured of it."""

    def __init__(self, lab: Laboratory | None, folder: Path, tuning: Tuning, seed: int) -> None:
        self._lab, self.folder, self.tuning, self.seed = lab, folder, tuning, seed
        self._tuned: Any = None
        self._candidate: Any = None
        self._cache = CompressionCache(folder)

    @property
    def lab(self) -> Laboratory:
        assert self._lab is not None  # made unless the time is 0, in which no cell begins
        return self._lab

    @property
    def tuned_folder(self) -> Path:
        return self.folder / "tuned"

    def make(self) -> dict[str, Any]:
        """Trains, and scores the fine-tune against itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_calibration(self.folder, self.tuning, self.seed)
        lab = self.lab
        losses = tune(lab.base, self.tuned_folder, self.tuning, self.seed, lab.device, lab.tokenizer)
        return {
            "first_loss": losses[0],
            "last_loss": sum(losses[-20:]) / len(losses[-20:]),
            **spectrum(lab.base, self.tuned_folder, lab.device),
            **self._score(self.tuned),
        }

    def score_base(self) -> dict[str, Any]:
        """The base on the same items."""
        return self._score(self.lab.model(self.lab.base))

    def score_method(self, method: str, inverse: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Compresses and scores base + delta."""
        path = self.folder / f"{method.replace(', ', '-').replace(' ', '-')}-{inverse}.safetensors"
        self._compress(path, method, self.lab.scale / inverse, changes)
        with Delta.open(path) as delta:
            matrices = [r for r in map(delta.record, delta.names) if isinstance(r, (FactoredRecord, DenseRecord))]
            stored = sum(record_bytes(record).total for record in matrices)
            bits: dict[int, int] = {}
            for record in matrices:
                if isinstance(record, FactoredRecord):
                    for band in record.v.bands:
                        bits[band.band.bits] = bits.get(band.band.bits, 0) + band.band.rank
            candidate = self._assembled(delta)
        size = path.stat().st_size
        path.unlink()
        return {
            "bytes": stored,
            "ratio": stored / self._dense_bytes(),
            "file_bytes": size,
            "ranks": bits,
            **self._score(candidate),
        }

    @property
    def tuned(self) -> Any:
        if self._tuned is None:
            self._tuned = self.lab.model(self.tuned_folder)
        return self._tuned

    def _compress(self, path: Path, method: str, ratio: float, changes: dict[str, Any]) -> None:
        lab, text = self.lab, str(self.folder / "calibration.jsonl")
        policies = Policies(embeddings="base", lm_head="base")
        if method == "bitdelta":
            options = BitDeltaOptions(text, policies=policies, device=lab.device)
            compress_bitdelta(lab.base, self.tuned_folder, path, options, force=True)
            return
        name = {"nearest": "triple"}.get(method, method.partition(",")[0])
        calibration = "none" if method in ("nearest", "low-rank") else text
        compression = CompressionOptions(
            Recipe.preset(name, ratio=ratio, **changes),
            calibration,
            samples=lab.samples,
            sequence_length=SEQUENCE_LENGTH,
            policies=policies,
            device=lab.device,
        )
        with self._cache.in_use():
            compress(lab.base, self.tuned_folder, path, compression, force=True, restart=True)

    def _assembled(self, delta: Delta) -> Any:
        """Base + delta, unrounded: the kernels add products, and never round a sum of weights to 16 bits."""
        base = Checkpoint.open(self.lab.base)
        if self._candidate is None:
            self._candidate = self.lab.model(self.tuned_folder)
        state = {name: tuned_tensor(base, delta, name, torch.float32) for name in tuned_names(base, delta)}
        self._candidate.load_state_dict(state, strict=False)
        return self._candidate

    def _dense_bytes(self) -> int:
        tuned = Checkpoint.open(self.tuned_folder)
        return sum(2 * math.prod(tuned.shape(name)) for name in tuned.names if name.endswith("_proj.weight"))

    def _score(self, model: Any) -> dict[str, Any]:
        lab = self.lab
        asked = {part: self._tests(part == "held_out") for part in ("seen", "held_out")}
        every = [item for tests in asked.values() for item in tests]
        right: list[bool] = []
        for start in range(0, len(every), BATCH):
            chunk = every[start : start + BATCH]
            answers = replies(model, lab.tokenizer, [item.prompt for item in chunk], lab.new_tokens)
            right += [a.strip() == item.completion.strip() for a, item in zip(answers, chunk, strict=True)]
        scores: dict[str, Any] = {}
        for part, found in (("seen", right[: len(asked["seen"])]), ("held_out", right[len(asked["seen"]) :])):
            scores[part] = sum(found) / len(found)
            scores[f"{part}_right"] = bits_of(found)
        tests = [encode(item, lab.tokenizer) for item in asked["held_out"]]
        answers, prompts = score_answers(self.tuned, model, tests)
        return {
            **scores,
            "kl": answers.kl,
            "kl_error": answers.kl_error,
            "kl_prompts": prompts.kl,
            "perplexity": answers.perplexity,
        }

    def _tests(self, held_out: bool) -> list[Item]:
        make = SKILLS[self.tuning.skill]
        return list(items(lambda source: make(source, held_out=held_out), self.lab.count, f"test {self.seed}"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, required=True, help="finished fine-tunes and cells")
    parser.add_argument("--output", type=Path, help="result as JSON; plots go beside it")
    parser.add_argument("--tunings", nargs="+", choices=list(TUNINGS), default=list(TUNINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="methods or ablations [default: all methods]")
    parser.add_argument("--ratios", type=int, nargs="+", help="inverse ratios [default: 16 32 8 64]")
    parser.add_argument("--tune-only", action="store_true", help="make and score the fine-tunes, and stop")
    parser.add_argument("--ablations", action="store_true", help="also every switch alone, at 1/16")
    parser.add_argument("--items", type=int, default=512, help="test items, seen and held-out each")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 256 tokens")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no cell after this time")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="two steps of everything: does it run at all?")
    arguments = parser.parse_args()
    arguments.smoke = Tuning("code", steps=2, batch_size=4, examples=8) if arguments.smoke else None
    return arguments


if __name__ == "__main__":
    main()
