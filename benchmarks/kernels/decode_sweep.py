# SPDX-License-Identifier: Apache-2.0
"""Decode of one token for each of several tenants by several builds of libdeltaweave, in one process.

    python benchmarks/kernels/decode_sweep.py OUTPUT.jsonl old/libdeltaweave.so new/libdeltaweave.so

Llama-2-7B's linears at 1, 8, 32 and 128 tenants, fp16, all tokens checked against float64 on the GPU and run to run. A
line of JSON a build and number of tenants: ms of 32 layers, us of each fused group and of its stages alone. The arena
is filled once by the first build, so that all must order weights alike. Two tenths of a second a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import delta_gemm
import numpy as np
import torch
from deltaweave.runtime_plugin.library import Library
from device_arena import Step
from factored_records import RandomRecord
from prefill_sweep import Records, expected_rows

TENANTS = (1, 8, 32, 128)


def measure(library: Library, tenants: delta_gemm.Tenants, records: Records, count: int) -> dict[str, Any]:
    """One line."""
    tenants.arena.library = library
    step = Step(tenants.arena, torch.arange(count, dtype=torch.int32))
    step.make_plan()
    groups, stages, works, worst, same = {}, {}, [], 0.0, True
    for name, (_, slices) in delta_gemm.GROUPS.items():
        calls, x, outputs = delta_gemm.group_work(tenants, step, name, count, torch.float16)

        def run(calls: list[Any] = calls, product: Callable[..., None] = library.delta_gemm) -> None:
            for gemm, _ in calls:
                product(gemm, torch.cuda.current_stream().cuda_stream)

        seen = []
        for _ in range(2):
            for y in outputs:
                y.zero_()
            library.delta_gemm(calls[0][0], torch.cuda.current_stream().cuda_stream)
            seen.append([y.clone() for y in outputs])
        same = same and all(torch.equal(first, second) for first, second in zip(*seen, strict=True))
        for y, (out, _) in zip(seen[0], slices, strict=True):
            expected = expected_rows(records[out, x.shape[1]], x)
            worst = max(worst, float((y.double() - expected).norm() / expected.norm()))
        groups[name] = round(delta_gemm.median_ms(run) / tenants.layers * 1e3, 2)
        halves = (partial(run, product=half) for half in (library.delta_shrink, library.delta_expand))
        stages[name] = [round(delta_gemm.median_ms(half) / tenants.layers * 1e3, 2) for half in halves]
        works.append((run, x, outputs, calls))

    def whole() -> None:
        step.make_plan()
        for run, *_ in works:
            run()

    milliseconds = delta_gemm.median_ms(whole) * delta_gemm.LAYERS / tenants.layers
    times = {"ms": milliseconds, "us": groups, "stages_us": stages}
    return {"tenants": count, **times, "relative_error": worst, "bits_repeat": same}


def main() -> None:
    """Measures every build; prints and writes lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file that lines are added to")
    parser.add_argument("libraries", type=Path, nargs="+", help="builds of libdeltaweave")
    arguments = parser.parse_args()
    for path in arguments.libraries:
        if not path.is_file():
            parser.error(f"{path}: no such library")
    rng = np.random.default_rng(0)
    shapes = {(out, size): bands for size, slices in delta_gemm.GROUPS.values() for out, bands in slices}
    records = {shape: RandomRecord.draw(rng, shape, bands) for shape, bands in shapes.items()}
    libraries = {path: Library(path) for path in arguments.libraries}
    with arguments.output.open("a") as lines:
        for count in TENANTS:
            first = next(iter(libraries.values()))
            tenants = delta_gemm.Tenants(first, count, max(2, min(16, 64 // count)), records)
            for path, library in libraries.items():
                row = {"library": str(path), **measure(library, tenants, records, count)}
                print(json.dumps(row), file=lines, flush=True)
                print(json.dumps(row), flush=True)
            del tenants
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
