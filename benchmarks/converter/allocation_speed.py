# SPDX-License-Identifier: Apache-2.0
"""Seconds that choosing the bits of a whole model takes, once its singular vectors are measured.

    python benchmarks/converter/allocation_speed.py --output benchmarks/results/allocation.json

Tables of Llama-2-7B's shapes: 224 projections of 4096 singular vectors, each at every width, with distortions that
fall as those of a fine-tune's spectrum do. Timed are one budget, and the whole curve that a search for a quality reads
its ratios from; with the blocks of 16 vectors that `compress` takes at these shapes, and with every vector by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.allocation import KERNEL_RANKS, DistortionTable, allocate, trade_curve

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from results_file import circumstances, write_result
from synthetic import SHAPES

WIDTHS, GROUP_SIZE, RATIO = (2, 3, 4, 8), 128, 1 / 16
# Share of a vector's worth that rounding at a width costs, about what tables of trained pairs have.
LOST = {1: 0.72, 2: 0.13, 3: 0.025, 4: 0.006, 8: 2e-5}
GOAL = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(arguments.shape, step, widths, arguments.repeats)
        for step in (KERNEL_RANKS, 1)
        for widths in (WIDTHS, (1, *WIDTHS))
    ]
    print(f"{'projections':>11} {'choices':>9} {'widths':>7} {'a budget':>10} {'the curve':>10}")
    for row in rows:
        print(
            f"{row['projections']:11} {row['choices']:9} {len(row['widths']):7} "
            f"{row['budget_seconds']:8.2f} s {row['curve_seconds']:8.2f} s"
        )
    write_result(arguments.output, {**circumstances("cpu"), "shape": arguments.shape, "goal": GOAL, "rows": rows})


def measure(shape: str, step: int, widths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Median seconds of an allocation and of a curve."""
    tables = synthetic_tables(shape, step, widths)
    budget = RATIO * sum(2 * table.shape[0] * table.shape[1] for table in tables.values())
    bytes_spent = allocate(tables, widths, GROUP_SIZE, budget).total_bytes
    assert 0.99 * budget < bytes_spent <= budget
    return {
        "projections": len(tables),
        "choices": sum(table.distortion.shape[1] for table in tables.values()),
        "widths": widths,
        "budget_seconds": seconds(lambda: allocate(tables, widths, GROUP_SIZE, budget), repeats),
        "curve_seconds": seconds(lambda: trade_curve(tables, widths, GROUP_SIZE), repeats),
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median over runs."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 3)


def synthetic_tables(shape: str, step: int, widths: tuple[int, ...]) -> dict[str, DistortionTable]:
    """A table for every projection; worth falls as in `synthetic.py`, and differs between projections and vectors."""
    model, generator = SHAPES[shape], torch.Generator().manual_seed(0)
    kv = model.hidden // model.heads * model.kv_heads
    block = [(model.hidden, model.hidden)] * 2 + [(kv, model.hidden)] * 2
    block += [(model.mlp, model.hidden)] * 2 + [(model.hidden, model.mlp)]
    tables = {}
    for layer in range(model.layers):
        for number, extents in enumerate(block):
            ranks = min(extents)
            worth = (1 + torch.arange(ranks).double() / 8) ** -1.4
            worth *= (torch.randn(ranks, generator=generator).double() + 2 * torch.randn(1, generator=generator)).exp()
            order = worth.argsort(descending=True)
            lost = torch.stack([worth, *(LOST[width] * worth for width in widths)])[:, order]
            tables[f"{layer}.{number}"] = DistortionTable(extents, order, lost.unflatten(1, (-1, step)).sum(2), step)
    return tables


if __name__ == "__main__":
    main()
