# SPDX-License-Identifier: Apache-2.0
"""The whole job on one page: train a pair, compress it at 1/16, check it, compare it, write a report.

    make demo                            # or: python examples/demo/run.py --folder demo --seed 0

Everything printed was just measured. The run fails loudly if training misses its target or if the methods do not do
what is claimed for them here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from deltaweave.converter import BitDeltaOptions, CompressionOptions, Recipe, compress, compress_bitdelta, verify
from deltaweave.formats import DeltaweaveError
from pair import Pair, make_pair
from rich.console import Console

from deltaweave.cli.console import progress_bar
from deltaweave.cli.tables import comparison_table, samples_table
from deltaweave.evaluation import Comparison, compare
from deltaweave.report import save_plots, write_report

__all__ = ["compare_methods", "compress_all", "unmet_claims"]

BASE, OPTIMAL, DELTA_COME, NEAREST = "base", "optimal", "delta-come", "round-to-nearest"
LOW_RANK, BITDELTA = "low-rank", "bitdelta"
SEQUENCE_LENGTH = 64  # the pair's own
UNLEARNED, KEPT, AHEAD_OF_LOW_RANK, SHARE_OF_KL = 0.05, 0.95, 0.10, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes [default: demo]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    start = time.monotonic()
    try:
        comparison = run(arguments.folder, arguments.seed, console)
    except DeltaweaveError as error:
        sys.exit(f"error: {error}")
    console.print(f"\nreport: {arguments.folder / 'report.html'}   ({time.monotonic() - start:.0f} seconds in all)")
    unmet = unmet_claims(comparison)
    if unmet:
        sys.exit("error: " + "; ".join(unmet))


def run(folder: Path, seed: int, console: Console) -> Comparison:
    """The demo's steps; returns what was measured."""
    console.print("[bold]1. A pair[/]: a small Llama trained from scratch, and a full fine-tune of it with new skills")
    pair = make_pair(folder / "pair", seed)
    solved = f"base {100 * pair.base_accuracy:.1f} %, fine-tune {100 * pair.tuned_accuracy:.1f} %"
    console.print(f"   held-out problems solved: {solved}")
    console.print("[bold]2. Five deltas[/]: four at 1/16 of the projections' bytes, BitDelta at its native size")
    deltas = compress_all(pair, folder / "deltas")
    console.print("[bold]3. Checks[/] of the Delta-CoMe file against its base and its fine-tune")
    for check in verify(deltas[DELTA_COME], pair.base, pair.tuned):
        console.print(f"   {'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}", markup=False)
        if not check.passed:
            raise DeltaweaveError(f"{deltas[DELTA_COME]}: {check.detail}")
    console.print("[bold]4. What is left of the fine-tune[/]\n")
    comparison = compare_methods(pair, list(deltas.values()))
    console.print(comparison_table(comparison))
    console.print(samples_table(comparison))
    write_report(folder / "report.html", comparison, list(deltas.values()), command="make demo", force=True)
    save_plots(folder / "plots", comparison, list(deltas.values()))
    return comparison


def compress_all(pair: Pair, folder: Path) -> dict[str, Path]:
    """The same pair by every method, calibrated on the same text."""
    folder.mkdir(parents=True, exist_ok=True)
    deltas = {name: folder / f"{name}.safetensors" for name in (OPTIMAL, DELTA_COME, NEAREST, LOW_RANK, BITDELTA)}
    text = str(pair.calibration)
    runs = {
        OPTIMAL: CompressionOptions(Recipe.preset("optimal"), text, samples=512, sequence_length=SEQUENCE_LENGTH),
        DELTA_COME: CompressionOptions(Recipe.preset("triple"), text, samples=512, sequence_length=SEQUENCE_LENGTH),
        NEAREST: CompressionOptions(Recipe.preset("triple"), "none"),
        LOW_RANK: CompressionOptions(Recipe.preset("low-rank"), "none"),
    }
    for name, options in runs.items():
        with progress_bar(f"{name}: ") as progress:
            compress(pair.base, pair.tuned, deltas[name], options, force=True, restart=True, progress=progress)
    options = BitDeltaOptions(text, steps=100, sequence_length=SEQUENCE_LENGTH)
    with progress_bar(f"{BITDELTA}: ") as progress:
        compress_bitdelta(pair.base, pair.tuned, deltas[BITDELTA], options, force=True, progress=progress)
    return deltas


def compare_methods(pair: Pair, deltas: list[Path]) -> Comparison:
    """Accuracy on the held-out problems, perplexity and KL on held-out text."""
    with progress_bar() as progress:
        return compare(
            pair.base,
            pair.tuned,
            deltas,
            text=pair.text,
            tasks=pair.tasks,
            sequence_length=SEQUENCE_LENGTH,
            sequences=128,
            sample_count=4,
            progress=progress,
        )


def unmet_claims(comparison: Comparison) -> list[str]:
    """What this demo claims of its pair and of Delta-CoMe, and did not find."""
    accuracy = {row.name: row.task.accuracy for row in comparison.candidates if row.task}
    kept = comparison.gain_kept(comparison[DELTA_COME]) or 0.0
    unmet = []
    if accuracy[BASE] >= UNLEARNED:
        unmet.append(f"the base solves {100 * accuracy[BASE]:.1f} %, expected less than {100 * UNLEARNED:.0f} %")
    if kept < KEPT:
        unmet.append(f"Delta-CoMe kept {100 * kept:.1f} % of the fine-tune's gain, expected {100 * KEPT:.0f} %")
    if accuracy[DELTA_COME] - accuracy[LOW_RANK] < AHEAD_OF_LOW_RANK:
        unmet.append(
            f"Delta-CoMe {accuracy[DELTA_COME]:.3f} is not 10 points ahead of low-rank {accuracy[LOW_RANK]:.3f}"
        )
    if accuracy[DELTA_COME] <= accuracy[BITDELTA]:
        unmet.append(f"Delta-CoMe {accuracy[DELTA_COME]:.3f} is not ahead of BitDelta {accuracy[BITDELTA]:.3f}")
    divergence = {row.name: row.text.kl for row in comparison.candidates if row.text}
    if divergence[OPTIMAL] > SHARE_OF_KL * divergence[DELTA_COME]:
        unmet.append(f"optimal's KL {divergence[OPTIMAL]:.5f} is not below Delta-CoMe's {divergence[DELTA_COME]:.5f}")
    return unmet


if __name__ == "__main__":
    main()
