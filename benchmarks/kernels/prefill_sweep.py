# SPDX-License-Identifier: Apache-2.0
"""Prefill of one tenant by several builds of libdeltaweave, in one process.

    python benchmarks/kernels/prefill_sweep.py OUTPUT.jsonl old/libdeltaweave.so new/libdeltaweave.so

Llama-2-7B's linears at 512 and 2048 tokens, fp16, all tokens checked against float64 on the GPU. A line of JSON a build
and token count: ms of 32 layers, us of each fused group, base + delta over base.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import delta_gemm
import numpy as np
import torch
from deltaweave.runtime_plugin.library import Library
from device_arena import Step
from factored_records import RandomRecord

LAYERS = 8
Records = dict[tuple[int, int], RandomRecord]


def expected_rows(record: RandomRecord, x: torch.Tensor) -> torch.Tensor:
    """The delta term of all rows in float64."""
    v, sigma, u = (torch.from_numpy(part).cuda().double() for part in (record.v.values, record.sigma, record.u.values))
    return ((x.double() @ v.T) * sigma) @ u


def measure(library: Library, tenants: delta_gemm.Tenants, records: Records, tokens: int) -> dict[str, Any]:
    """One line, but for the base."""
    step = Step(tenants.arena, torch.zeros(tokens, dtype=torch.int32))
    step.make_plan()
    groups, works, worst = {}, [], 0.0
    for name, (features, slices) in delta_gemm.GROUPS.items():
        calls, x, outputs = delta_gemm.group_work(tenants, step, name, tokens, torch.float16)
        library.delta_gemm(calls[0][0], torch.cuda.current_stream().cuda_stream)
        for y, (out, _) in zip(outputs, slices, strict=True):
            expected = expected_rows(records[out, features], x)
            worst = max(worst, float((y.double() - expected).norm() / expected.norm()))

        def run(calls: list[Any] = calls) -> None:
            for gemm, _ in calls:
                library.delta_gemm(gemm, torch.cuda.current_stream().cuda_stream)

        groups[name] = round(delta_gemm.median_ms(run) / LAYERS * 1e3, 1)
        works.append((run, x, outputs, calls))

    def whole() -> None:
        for run, *_ in works:
            run()

    milliseconds = delta_gemm.median_ms(whole) * delta_gemm.LAYERS / LAYERS
    return {"tokens": tokens, "ms": milliseconds, "us": groups, "relative_error": worst}


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
    base = {tokens: delta_gemm.base_ms(tokens, LAYERS, torch.float16) for tokens in (512, 2048)}
    with arguments.output.open("a") as lines:
        for path in arguments.libraries:
            library = Library(path)
            tenants = delta_gemm.Tenants(library, 1, LAYERS, records)
            for tokens, cublas in base.items():
                row = {"library": str(path), **measure(library, tenants, records, tokens), "base_ms": cublas}
                row["base_and_delta_over_base"] = 1 + row["ms"] / cublas
                print(json.dumps(row), file=lines, flush=True)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
