# SPDX-License-Identifier: Apache-2.0
"""delta_gemm on Llama-2-7B's linears, one token for each of 1, 8, 32 and 128 tenants, and prefill of one tenant.

    DELTAWEAVE_LIBRARY=build/sm90/cuda/libdeltaweave.so python benchmarks/kernels/delta_gemm.py

Weights are random packed codes of the preset 8+3+2 at the real sizes. A step is a CUDA graph over several layers, as
many as make the weights many times the L2, so that no replay finds them cached. Every shape is first checked against
float64.
The base is the faster of cuBLAS in the same run and its bytes at the copy rate of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests"))

from deltaweave.runtime_plugin.library import Library, Parameter, ParameterKind, Record  # noqa: E402
from deltaweave.runtime_plugin.pytorch.context_switch import context_switch  # noqa: E402
from device_arena import DeviceArena, Step, to_device  # noqa: E402
from factored_records import RandomBand, RandomRecord  # noqa: E402
from results_file import circumstances, write_result  # noqa: E402

LAYERS = 32
ATTENTION = (RandomBand(8, 2), RandomBand(3, 32), RandomBand(2, 968))
MLP = (RandomBand(8, 2), RandomBand(3, 32), RandomBand(2, 1428))
# Fused groups: in_features, then (out_features, bands) a slice.
GROUPS: dict[str, tuple[int, list[tuple[int, tuple[RandomBand, ...]]]]] = {
    "qkv": (4096, [(4096, ATTENTION)] * 3),
    "o": (4096, [(4096, ATTENTION)]),
    "gate_up": (4096, [(11008, MLP)] * 2),
    "down": (11008, [(4096, MLP)]),
}
MAX_RANK = 4096  # what hosts allow for: the largest possible, whatever the tenants have


def median_ms(work: Callable[[], None], repeats: int = 15) -> float:
    """Median time of a CUDA graph of `work`, after a switch of contexts: captures change streams."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    context_switch(torch.cuda.current_device())()
    return event_ms(graph.replay, repeats)


def event_ms(work: Callable[[], Any], repeats: int = 15) -> float:
    """Median time by events, after three runs that are not timed."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes read plus written a second by a large device copy."""
    source = torch.randn((1 << 30,), device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_ms(lambda: target.copy_(source)) * 1e3


def file_tensors(record: RandomRecord) -> tuple[bytes, ...]:
    """Codes and grids of v and u."""
    return record.v.codes, record.v.grid, record.u.codes, record.u.grid


class Tenants:
    """`count` tenants of `layers` layers, all with the same random records."""

    def __init__(self, library: Library, count: int, layers: int, records: dict[Any, RandomRecord]) -> None:
        self.layers = layers
        self.index: dict[tuple[int, str, int], int] = {}
        parameters, owners = [], []
        for layer in range(layers):
            for name, (features, slices) in GROUPS.items():
                for place, (out, _) in enumerate(slices):
                    self.index[layer, name, place] = len(parameters)
                    parameters.append(Parameter(ParameterKind.LINEAR, features, out, 0, 0))
                    owners.append(records[out, features])
        shapes = [
            Record.factored(i, [(band.bits, band.rank, band.grid) for band in record.bands])
            for i, record in enumerate(owners)
        ]
        probe = DeviceArena(library, parameters, slots=1, size=256, max_rank=MAX_RANK)
        self.tenant_bytes = probe.arena.tenant_bytes(shapes)
        self.arena = DeviceArena(
            library, parameters, slots=count, size=count * (self.tenant_bytes + 256), max_rank=MAX_RANK
        )
        parts = {
            id(record): [to_device(data) for data in (*file_tensors(record), record.sigma.tobytes(), b"")]
            for record in records.values()
        }
        for _ in range(count):
            slot = self.arena.arena.reserve(shapes)
            for i, record in enumerate(owners):
                self.arena.repack(slot, i, shapes[i], parts[id(record)])
            self.arena.publish(slot)

    def group_bytes(self, name: str) -> int:
        """Arena bytes of one tenant's fused group in one layer."""
        slices = len(GROUPS[name][1])
        return sum(self.arena.arena.payload(0, self.index[0, name, place]).bytes for place in range(slices))


def group_work(
    tenants: Tenants, step: Step, name: str, tokens: int, dtype: torch.dtype
) -> tuple[list[Any], torch.Tensor, list[torch.Tensor]]:
    """Arguments of a fused group in every layer, its x and its outputs."""
    features, slices = GROUPS[name]
    x = torch.randn((tokens, features), device="cuda").to(dtype)
    outputs = [torch.zeros((tokens, out), device="cuda", dtype=dtype) for out, _ in slices]
    calls = [
        step.product(x, [(tenants.index[layer, name, place], y) for place, y in enumerate(outputs)])
        for layer in range(tenants.layers)
    ]
    return calls, x, outputs


def check_group(name: str, x: torch.Tensor, outputs: list[torch.Tensor], records: dict[Any, RandomRecord]) -> float:
    """Largest relative error of the group's slices after one product into zeros, on four tokens."""
    features, slices = GROUPS[name]
    rows = np.unique(np.linspace(0, len(x) - 1, 4).astype(int))
    worst = 0.0
    for y, (out, _) in zip(outputs, slices, strict=True):
        expected = records[out, features].apply(x.double().cpu().numpy()[rows])
        got = y.double().cpu().numpy()[rows]
        worst = max(worst, float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
    return worst


def base_ms(tokens: int, layers: int, dtype: torch.dtype) -> float:
    """The model's linears by cuBLAS, scaled to all layers."""
    shapes = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    weights = [torch.randn(shape, device="cuda", dtype=dtype) * 0.01 for _ in range(layers) for shape in shapes]
    inputs = {features: torch.randn((tokens, features), device="cuda", dtype=dtype) for features in (4096, 11008)}
    outputs = {shape: torch.empty((tokens, shape[0]), device="cuda", dtype=dtype) for shape in shapes}

    def work() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T, out=outputs[tuple(weight.shape)])

    return median_ms(work) * LAYERS / layers


def measure(
    library: Library, tenants: Tenants, count: int, tokens: int, records: dict[Any, RandomRecord], rate: float
) -> dict[str, Any]:
    """One row of the table: `tokens` tokens over `count` tenants."""
    dtype = torch.float16
    slots = torch.arange(tokens, dtype=torch.int32) % count
    step = Step(tenants.arena, slots)
    step.make_plan()
    stream = torch.cuda.current_stream
    groups, work = {}, []
    for name in GROUPS:
        calls, x, outputs = group_work(tenants, step, name, tokens, dtype)
        library.delta_gemm(calls[0][0], stream().cuda_stream)
        error = check_group(name, x, outputs, records)

        def run(calls: list[Any] = calls) -> None:
            for gemm, _ in calls:
                library.delta_gemm(gemm, stream().cuda_stream)

        milliseconds = median_ms(run) / tenants.layers
        packed = tenants.group_bytes(name) * count
        groups[name] = {
            "us": milliseconds * 1e3,
            "packed_mb": packed / 1e6,
            "share_of_copy_rate": packed / milliseconds * 1e3 / rate,
            "relative_error": error,
        }
        work.append((run, x, outputs, calls))

    def whole() -> None:
        step.make_plan()
        for run, *_ in work:
            run()

    delta = median_ms(whole) * LAYERS / tenants.layers
    cublas = base_ms(tokens, min(8, tenants.layers), dtype)
    parameters = LAYERS * (4096 * (12288 + 4096 + 22016) + 11008 * 4096)
    roofline = 2 * parameters / rate * 1e3
    base = min(cublas, roofline) if tokens <= 128 else cublas
    return {
        "tokens": tokens,
        "tenants": count,
        "layers_measured": tenants.layers,
        "delta_ms": delta,
        "base_cublas_ms": cublas,
        "base_roofline_ms": roofline,
        "delta_over_base": delta / base,
        "share_of_copy_rate": count * tenants.tenant_bytes / tenants.layers * LAYERS / delta * 1e3 / rate,
        "groups": groups,
    }


def print_row(row: dict[str, Any]) -> None:
    parts = "  ".join(f"{name} {g['us']:.1f} us {g['share_of_copy_rate']:.0%}" for name, g in row["groups"].items())
    error = max(group["relative_error"] for group in row["groups"].values())
    base = f"base {row['base_cublas_ms']:7.3f} ms (roofline {row['base_roofline_ms']:.3f})"
    share = f"ratio {row['delta_over_base']:6.3f}  copy share {row['share_of_copy_rate']:.0%}"
    head = f"{row['tokens']:5d} tokens {row['tenants']:4d} tenants  delta {row['delta_ms']:8.3f} ms"
    print(f"{head}  {base}  {share}  error {error:.1e}\n      {parts}", flush=True)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "delta_gemm.json")
    parser.add_argument("--tenants", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512, 2048])
    options = parser.parse_args()
    library = Library()
    rng = np.random.default_rng(0)
    shapes = {(out, features): bands for features, slices in GROUPS.values() for out, bands in slices}
    records = {shape: RandomRecord.draw(rng, shape, bands) for shape, bands in shapes.items()}
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s", flush=True)
    rows = []
    for count in sorted({*options.tenants, *([1] if options.prefill else [])}):
        tenants = Tenants(library, count, max(2, min(16, 64 // count)), records)
        steps = [count] if count in options.tenants else []
        for tokens in steps + (options.prefill if count == 1 else []):
            rows.append(measure(library, tenants, count, tokens, records, rate))
            print_row(rows[-1])
        del tenants
        torch.cuda.empty_cache()
    report = {
        **circumstances(),
        "model": "Llama-2-7B linears, preset 8+3+2, group size 128, fp16 activations",
        "copy_rate_bytes_per_second": rate,
        "rows": rows,
    }
    write_result(options.output, report)


if __name__ == "__main__":
    main()
