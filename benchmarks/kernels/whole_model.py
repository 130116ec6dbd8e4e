# SPDX-License-Identifier: Apache-2.0
"""What a tenant brings beside its projections, at Llama-2-7B's sizes: lm_head, norms, biases, embeddings; and repack.

    DELTAWEAVE_LIBRARY=build/sm90/cuda/libdeltaweave.so python benchmarks/kernels/whole_model.py

Medians of CUDA graphs that run over so many parameters that no launch finds its tenants' bytes in the cache. lm_head is
checked against float64 first. About 10 GB of device memory, half a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests"))

from deltaweave.runtime_plugin.library import (  # noqa: E402
    Bias,
    BiasSlice,
    Embedding,
    Library,
    Norm,
    Parameter,
    ParameterKind,
    Record,
)
from device_arena import DeviceArena, Step  # noqa: E402
from results_file import circumstances, write_result  # noqa: E402
from rivals.timing import copy_rate, graph_timing  # noqa: E402

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
COLD_BYTES = 300e6  # several times the L2
DTYPE = torch.float16
Tensors = dict[str, torch.Tensor]


def random_bytes(count: int) -> torch.Tensor:
    """Codes of any width."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")


def random_grid(rows: int, groups: int, size: float) -> torch.Tensor:
    """(scale, zero) of 8-bit codes."""
    scale = torch.rand((rows, groups), device="cuda") * size
    return torch.stack([scale, torch.full_like(scale, 128.0)], dim=-1).to(torch.float16)


def dense_table() -> tuple[Callable[[int], Record], Tensors]:
    """8-bit rows for the whole vocabulary."""
    grid = random_grid(VOCABULARY, HIDDEN // 128, 1e-4)
    tensors = {"v_codes": random_bytes(VOCABULARY * HIDDEN), "v_grid": grid}
    return lambda index: Record.dense(index, VOCABULARY, 8, "affine"), tensors


def changed_rows(count: int) -> tuple[Callable[[int], Record], Tensors]:
    """fp16 rows that replace some of the base's."""
    indices = torch.randperm(VOCABULARY, device="cuda")[:count].sort().values.int()
    values = (torch.randn((count, HIDDEN), device="cuda") / 64).half()
    return lambda index: Record.replaced_rows(index, count), {"indices": indices, "values": values}


def fill(library: Library, parameters: list[Parameter], tenants: int, shape: Any, tensors: Tensors) -> DeviceArena:
    """An arena whose tenants all have the same record of every parameter."""
    shapes = [shape(index) for index in range(len(parameters))]
    probe = DeviceArena(library, parameters, slots=1, size=256, max_rank=2048)
    size = tenants * (probe.arena.tenant_bytes(shapes) + 256)
    arena = DeviceArena(library, parameters, slots=tenants, size=size, max_rank=2048)
    for _ in range(tenants):
        slot = arena.arena.reserve(shapes)
        for index, record in enumerate(shapes):
            arena.repack_tensors(slot, index, record, tensors)
        arena.publish(slot)
    return arena


def tenant_bytes(arena: DeviceArena) -> int:
    """Of one record."""
    return arena.arena.payload(0, 0).bytes


def slots_of(tokens: int, tenants: int) -> torch.Tensor:
    return torch.arange(tokens, dtype=torch.int32, device="cuda") % tenants


def graph_us(work: Callable[[], None], launches: int) -> float:
    """Median microseconds a launch."""
    work()
    torch.cuda.synchronize()
    return graph_timing(work).median * 1e3 / launches


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def measure_head(library: Library, kind: str, tokens: int, tenants: int, rate: float) -> dict[str, Any]:
    """dense_gemm over as many heads as make it cold."""
    shape, tensors = dense_table() if kind == "dense 8-bit" else changed_rows(VOCABULARY // 20)
    each = sum(tensor.nbytes for tensor in tensors.values()) * tenants
    heads = max(1, int(-(-COLD_BYTES // each)))
    arena = fill(library, [Parameter(ParameterKind.LINEAR, HIDDEN, VOCABULARY, 0, 0)] * heads, tenants, shape, tensors)
    step = Step(arena, slots_of(tokens, tenants))
    step.make_plan()
    x = torch.randn((tokens, HIDDEN), device="cuda").to(DTYPE)
    y = torch.zeros((tokens, VOCABULARY), device="cuda", dtype=DTYPE)
    calls = [step.product(x, [(index, y)]) for index in range(heads)]
    library.dense_gemm(calls[0][0], stream())
    error = head_error(tensors, x, y)

    def work() -> None:
        for gemm, _ in calls:
            library.dense_gemm(gemm, stream())

    us, packed = graph_us(work, heads), tenant_bytes(arena) * tenants
    return {
        "what": f"lm_head, {kind}", "tokens": tokens, "tenants": tenants, "us": us, "packed_mb": packed / 1e6,
        "share_of_copy_rate": packed / us * 1e6 / rate, "relative_error": error,
    }  # fmt: skip


def head_error(tensors: Tensors, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the first token, norm-wise, against float64."""
    if "indices" in tensors:
        expected = tensors["values"].double() @ x[0].double()
        got = y[0, tensors["indices"].long()].double()
    else:
        codes = tensors["v_codes"].view(VOCABULARY, HIDDEN // 128, 128).double()
        scale, zero = tensors["v_grid"].double().unbind(-1)
        expected = ((codes - zero[..., None]) * scale[..., None]).view(VOCABULARY, HIDDEN) @ x[0].double()
        got = y[0].double()
    return float((got - expected).norm() / expected.norm())


def measure_vectors(library: Library, tokens: int, tenants: int) -> list[dict[str, Any]]:
    """A step's norms, and biases of q, k and v, a launch each."""
    values = {"values": torch.rand(HIDDEN, device="cuda")}
    parameters = [Parameter(ParameterKind.VECTOR, HIDDEN, 1, 0, 0)] * (2 * LAYERS)
    arena = fill(library, parameters, tenants, Record.values, values)
    slots = slots_of(tokens, tenants)
    x = torch.randn((tokens, HIDDEN), device="cuda").to(DTYPE)
    outputs = [torch.zeros_like(x) for _ in range(3)]
    weight = torch.rand(HIDDEN, device="cuda").to(DTYPE)
    batch = arena.batch(slots, DTYPE)
    norms = [
        Norm(
            batch, index, 1, HIDDEN, 1e-5, x.data_ptr(), HIDDEN, HIDDEN, outputs[0].data_ptr(), HIDDEN, HIDDEN,
            weight.data_ptr(),
        )
        for index in range(2 * LAYERS)
    ]  # fmt: skip
    biases = []
    for layer in range(LAYERS):
        bias = Bias(batch, 3)
        for place, y in enumerate(outputs):
            bias.slices[place] = BiasSlice((2 * layer + place) % len(parameters), HIDDEN, y.data_ptr(), HIDDEN, None)
        biases.append(bias)

    def all_norms() -> None:
        for norm in norms:
            library.rms_norm(norm, stream())

    def all_biases() -> None:
        for bias in biases:
            library.add_bias(bias, stream())

    sizes = {"tokens": tokens, "tenants": tenants}
    return [
        {"what": "RMSNorm of 4096", **sizes, "us": graph_us(all_norms, len(norms))},
        {"what": "biases of q, k and v", **sizes, "us": graph_us(all_biases, len(biases))},
    ]


def measure_embedding(library: Library, tokens: int, tenants: int) -> dict[str, Any]:
    """One look-up in 8-bit tables."""
    shape, tensors = dense_table()
    arena = fill(library, [Parameter(ParameterKind.EMBEDDING, HIDDEN, VOCABULARY, 0, 0)], tenants, shape, tensors)
    slots = slots_of(tokens, tenants)
    table = torch.randn((VOCABULARY, HIDDEN), device="cuda").to(DTYPE)
    y = torch.empty((tokens, HIDDEN), device="cuda", dtype=DTYPE)
    ids = torch.randint(0, VOCABULARY, (16, tokens), device="cuda")
    batch = arena.batch(slots, DTYPE)
    calls = [
        Embedding(
            batch, 0, VOCABULARY, HIDDEN, 0, row.data_ptr(), table.data_ptr(), HIDDEN, y.data_ptr(), HIDDEN
        )
        for row in ids
    ]  # fmt: skip

    def work() -> None:
        for call in calls:
            library.embed(call, stream())

    return {"what": "embedding, dense 8-bit", "tokens": tokens, "tenants": tenants, "us": graph_us(work, len(calls))}


def measure_repack(library: Library, out: int, features: int, two_bit_rank: int, rate: float) -> dict[str, Any]:
    """A projection's record of the preset, from device memory in file order."""
    bands = [(8, 2, "affine"), (3, 32, "affine"), (2, two_bit_rank, "affine")]
    rank = 34 + two_bit_rank

    def codes(length: int) -> torch.Tensor:
        return random_bytes(sum(bits * count * length // 8 for bits, count, _ in bands) + 64)

    tensors = {
        "v_codes": codes(features), "v_grid": random_grid(rank, features // 128, 0.01),
        "u_codes": codes(out), "u_grid": random_grid(rank, out // 128, 0.01),
        "sigma": torch.rand(rank, device="cuda"),
    }  # fmt: skip
    parameters = [Parameter(ParameterKind.LINEAR, features, out, 0, 0)] * LAYERS
    arena = fill(library, parameters, 1, lambda index: Record.factored(index, bands), tensors)
    calls = [arena.repack_arguments(0, index, Record.factored(index, bands), tensors) for index in range(LAYERS)]

    def work() -> None:
        for call in calls:
            library.repack(call, stream())

    us = graph_us(work, len(calls))
    packed = tenant_bytes(arena)
    return {
        "what": f"repack {out} x {features}", "tokens": 0, "tenants": 1, "us": us, "packed_mb": packed / 1e6,
        "share_of_copy_rate": 2 * packed / us * 1e6 / rate,
    }  # fmt: skip


def measure_all(library: Library, rate: float) -> list[dict[str, Any]]:
    """Every row, printed as it comes."""
    rows: list[dict[str, Any]] = []

    def add(*more: dict[str, Any]) -> None:
        rows.extend(more)
        for row in more:
            print_row(row)
        torch.cuda.empty_cache()

    for tokens, tenants in ((1, 1), (8, 8), (32, 32), (8, 1)):
        for kind in ("dense 8-bit", "5 % of the rows"):
            add(measure_head(library, kind, tokens, tenants, rate))
    for tokens in (1, 32, 128):
        add(*measure_vectors(library, tokens, tokens))
    for tokens in (1, 32):
        add(measure_embedding(library, tokens, tokens))
    add(measure_repack(library, HIDDEN, HIDDEN, 968, rate))
    add(measure_repack(library, INTERMEDIATE, HIDDEN, 1428, rate))
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    line = f"{row['what']:28s} {row['tokens']:4d} tokens {row['tenants']:4d} tenants {row['us']:9.1f} us"
    if "packed_mb" in row:
        line += f" {row['packed_mb']:9.1f} MB  copy share {row['share_of_copy_rate']:.0%}"
    if "relative_error" in row:
        line += f"  error {row['relative_error']:.1e}"
    print(line, flush=True)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "whole_model.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("whole_model.py: needs an NVIDIA GPU", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s", flush=True)
    rows = measure_all(Library(), rate)
    report = {
        **circumstances(),
        "model": "Llama-2-7B: hidden 4096, vocabulary 32000; fp16 activations",
        "copy_rate_bytes_per_second": rate,
        "rows": rows,
    }
    write_result(options.output, report)


if __name__ == "__main__":
    main()
