# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prefill of a TensorRT engine on Llama-2-7B's shapes, beside the PyTorch host with CUDA graphs.

Weights and codes are random, layers may be fewer; both hosts run in one process on the same base and deltas, float16.
The bare base is the same engine with every row at the base. A profile of both hosts says which kernels a step's time
goes into: ours, the same library in both, and the host's own.

    python benchmarks/runtime/engine.py --layers 4 --output benchmarks/results/engine.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deltaweave.runtime_plugin.pytorch import Arena, Decoder, Request, attach
from deltaweave.runtime_plugin.trt.engine import Engine
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled
from transformers import AutoModelForCausalLM, LlamaConfig

from deltaweave.engines import EngineOptions, build_engine

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from random_delta import published_bands, random_delta
from results_file import circumstances, write_result

MIB = 1 << 20
OURS = "dw::"  # the namespace of libdeltaweave's kernels
PROFILED_STEPS, LISTED_KERNELS = 16, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--length", type=int, default=512, help="positions of the cache")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_llama(arguments.layers)
        model.save_pretrained(folder / "base")
        deltas = {
            f"t{number}": random_delta(
                folder / f"t{number}.safetensors",
                model,
                seed=number,
                bands=published_bands,
                vocabulary="none",
                size=0.01,
            )
            for number in range(arguments.tenants)
        }
        start = time.perf_counter()
        build_engine(
            folder / "base",
            folder / "engine",
            EngineOptions(
                dtype="float16",
                max_batch=max(arguments.batches),
                max_tokens=min(2048, arguments.length),
                max_sequence=arguments.length,
                max_tenants=arguments.tenants,
                arena_bytes=capacity(deltas),
            ),
        )
        result: dict[str, Any] = {
            **circumstances(),
            "layers": arguments.layers,
            "tenants": arguments.tenants,
            "cache": arguments.length,
            "prompt": arguments.prompt,
            "build_seconds": time.perf_counter() - start,
        }
        start = time.perf_counter()
        with Engine(folder / "engine") as engine:
            result["load_seconds"] = time.perf_counter() - start
            for name, path in deltas.items():
                engine.add(path, name, accept_base=True)
            result["engine"] = measure(engine.run, arguments)
            result["engine_profile"] = profile(engine.run, arguments)
        result |= measure_pytorch(model, deltas, arguments)
    report(result)
    write_result(arguments.output, result)


def capacity(deltas: dict[str, Path]) -> int:
    """Room for all."""
    return 64 * MIB + 2 * sum(path.stat().st_size for path in deltas.values())


def random_llama(layers: int) -> Any:
    """Llama-2-7B's shapes in float16."""
    config = LlamaConfig(num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    return model.eval()


def measure_pytorch(model: Any, deltas: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    arena = Arena.for_model(model, capacity_bytes=capacity(deltas), slots=len(deltas))
    for name, path in deltas.items():
        arena.add(path, name, accept_base=True)
    rows = max(arguments.batches)
    with (
        attach(model, arena) as attachment,
        Decoder(model, attachment, max_batch=rows, max_length=arguments.length) as decoder,
    ):
        return {"pytorch": measure(decoder.run, arguments), "pytorch_profile": profile(decoder.run, arguments)}


def measure(run: Callable[..., Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over a run whose shapes were warmed by the one before."""
    found = []
    for batch in arguments.batches:
        for tenants in (0, 1, arguments.tenants):
            requests = make_requests(batch, tenants, arguments.prompt, arguments.new)
            run(requests)
            times: list[list[float]] = [[] for _ in requests]

            def write(index: int, token: int, times: list[list[float]] = times) -> None:
                times[index].append(time.perf_counter())

            start = time.perf_counter()
            run(requests, write)
            steps = [1e3 * (after - before) for before, after in zip(times[-1], times[-1][1:], strict=False)]
            found.append(
                {
                    "batch": batch,
                    "tenants": tenants,
                    "step_ms": statistics.median(steps),
                    "step_ms_90": statistics.quantiles(steps, n=10)[-1],
                    "first_token_ms": 1e3 * (times[0][0] - start),
                }
            )
    return found


def make_requests(batch: int, tenants: int, prompt: int, new: int) -> list[Request]:
    """Tenants take turns over the rows; none of them is the bare base."""
    names = [f"t{number}" for number in range(tenants)] or [None]
    tokens = [(7 * place + 3) % 32000 for place in range(prompt)]
    return [Request(tokens, names[row % len(names)], new) for row in range(batch)]


def profile(run: Callable[..., Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of a decode step by kernel, with every tenant at work: a run of many tokens less one of few."""
    found = []
    for batch in arguments.batches:
        long, short = (
            kernel_times(run, make_requests(batch, arguments.tenants, arguments.prompt, new))
            for new in (2 + PROFILED_STEPS, 2)
        )
        times = {kernel: (spent - short[kernel]) / PROFILED_STEPS for kernel, spent in long.items()}
        ranked = sorted(times, key=times.__getitem__, reverse=True)
        found.append(
            {
                "batch": batch,
                "ours_us": sum(spent for kernel, spent in times.items() if OURS in kernel),
                "host_us": sum(spent for kernel, spent in times.items() if OURS not in kernel),
                "kernels_us": {kernel[:120]: times[kernel] for kernel in ranked[:LISTED_KERNELS]},
            }
        )
    return found


def kernel_times(run: Callable[..., Any], requests: list[Request]) -> defaultdict[str, float]:
    """Microseconds on the GPU by kernel, of a run that was warmed."""
    run(requests)
    with profiled(activities=[ProfilerActivity.CUDA]) as events:
        run(requests)
    times: defaultdict[str, float] = defaultdict(float)
    for event in events.key_averages():
        times[event.key] += event.device_time_total
    return times


def report(result: dict[str, Any]) -> None:
    print(f"build {result['build_seconds']:.1f} s, load {result['load_seconds']:.1f} s, {result['layers']} layers")
    for mine, theirs in zip(result["engine"], result["pytorch"], strict=True):
        print(
            f"batch {mine['batch']:2} tenants {mine['tenants']:2}: engine {mine['step_ms']:.3f} ms a step "
            f"(90 %: {mine['step_ms_90']:.3f}), first token {mine['first_token_ms']:.2f}; "
            f"PyTorch {theirs['step_ms']:.3f}, {theirs['first_token_ms']:.2f}"
        )
    for host in ("engine", "pytorch"):
        for line in result[f"{host}_profile"]:
            ours, own = line["ours_us"], line["host_us"]
            print(f"{host}, batch {line['batch']}: our kernels {ours:.0f} us a step, its own {own:.0f}")
            for kernel, time_us in line["kernels_us"].items():
                print(f"{time_us:9.1f}  {kernel}")


if __name__ == "__main__":
    main()
