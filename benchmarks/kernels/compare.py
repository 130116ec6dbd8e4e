# SPDX-License-Identifier: Apache-2.0
"""deltaweave's delta product against every rival, in one process, on real layer sizes.

    RIVALS=... DELTAWEAVE_LIBRARY=build/sm90/cuda/libdeltaweave.so python benchmarks/kernels/compare.py

Each contender is checked against a float64 product of exactly the weights it holds, then timed: the median of replays
of a CUDA graph over so many layers that no launch finds its weights in the cache. README.md beside this says where the
rivals' packages come from. `--report FILE` prints the tables of a finished run and draws its plots again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rivals.cases import MODELS  # noqa: E402
from rivals.report import draw, markdown  # noqa: E402


def main() -> None:
    """Compiles, measures, writes."""
    options = _options()
    if options.report:
        content = json.loads(options.report.read_text())
        print(markdown(content))
        draw(content, options.report.parent, options.report.stem)
        return
    import torch

    if not torch.cuda.is_available():
        print("compare.py: needs an NVIDIA GPU", file=sys.stderr)
        raise SystemExit(2)
    from rivals.contenders import plan
    from rivals.warm import compile_in_workers, warm_entries, work

    entries = plan(options.models, options.tenants, options.prefill, options.tables)
    if options.contenders:
        entries = [entry for entry in entries if entry[0].name in options.contenders]
    if options.worker:
        index, count = (int(part) for part in options.worker[0].split("/"))
        work(warm_entries(entries)[index::count], Path(options.worker[1]))
        return
    reasons: dict[str, str] = {}
    if options.workers:
        reasons = compile_in_workers(entries, options.workers, options.compile_seconds, sys.argv)
    content = _run(entries, reasons, options)
    print(markdown(content))
    draw(content, options.output.parent, options.output.stem)


def _run(entries: list[Any], reasons: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures until done or out of time; the file is rewritten after every case."""
    import torch
    from results_file import circumstances, write_result
    from rivals.measure import Row, device_works, measure
    from rivals.timing import copy_rate
    from rivals.warm import failed

    begin, lost = time.monotonic(), ""
    rate = copy_rate()
    torch.cuda.empty_cache()
    print(f"copy rate {rate / 1e12:.2f} TB/s", flush=True)
    content = {**circumstances(), **_versions(), "copy_rate_bytes_per_second": rate, "rows": []}
    for place, (kind, case) in enumerate(entries):
        reason = lost or failed((kind, case), reasons)
        if not reason and time.monotonic() - begin > options.seconds:
            reason = f"not run: the run's {options.seconds:g} seconds were over"
        row = Row.of(kind, case, reason=reason) if reason else measure(kind, case, rate)
        content["rows"].append(row.to_json())
        if row.reason and not lost and not device_works():
            lost = f"not run: {kind.name} left the device unusable"
        result = row.reason or f"{row.us:10.1f} us  copy share {row.share:4.0%}  error {row.error:.1e}"
        print(f"{time.monotonic() - begin:6.1f} s  {case.name:48s} {kind.name:16s} {result}", flush=True)
        if place + 1 == len(entries) or entries[place + 1][1] != case:
            write_result(options.output, content)
    print(f"measured in {time.monotonic() - begin:.0f} s; {_outcomes(content)}", flush=True)
    return content


def _outcomes(content: dict[str, Any]) -> str:
    counts = Counter("measured" if "us" in row else row["reason"] for row in content["rows"])
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())


def _versions() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", "triton", "numpy")}
    return {"versions": versions | _rival_versions(), "activations": "bfloat16 (gemlite: float16)"}


def _rival_versions() -> dict[str, str]:
    """Of the unpacked packages, by the folders that their wheels carry."""
    root = Path(os.environ.get("RIVALS", "/nonexistent"))
    names = [path.name.removesuffix(".dist-info") for path in sorted(root.glob("*/*.dist-info"))]
    return dict(name.split("-", 1) for name in names)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kernel_rivals.json")
    parser.add_argument("--report", type=Path, help="print and draw an earlier run instead of measuring")
    parser.add_argument(
        "--tables", nargs="+", default=["models", "bands", "sweep"], choices=["models", "bands", "sweep"]
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", help="names as in the JSON; default: all")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--seconds", type=float, default=240.0, help="measuring ends after this time")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile first; 0 for none")
    parser.add_argument("--compile-seconds", type=float, default=75.0)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
