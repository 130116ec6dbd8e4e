# SPDX-License-Identifier: Apache-2.0
"""What deltas add to a decode step's products of the base, added to their outputs or computed in one call with them.

    python benchmarks/kernels/base_sweep.py OUTPUT.jsonl build/sm90/cuda/libdeltaweave.so [--dtype bfloat16]

Llama-2-7B's linears for 1, 4, 8 and 32 tokens of as many tenants: the base's products, the deltas, and behind each
product a kernel that reads its outputs once, as an activation or a norm does; 32 layers as one CUDA graph. A line of
JSON a number of tenants: ms of every layout, and us of each fused group. The results of each are checked against
float64 on the GPU. About two seconds a line.

base         products of the base alone, by torch.mm
one stream   torch.mm, and then the deltas added to its y
in the call  one call of delta_gemm for base and deltas, for as few tokens as it takes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import delta_gemm
import numpy as np
import torch
from deltaweave.runtime_plugin.library import BASE_TOKENS, Library
from device_arena import Step
from factored_records import RandomRecord
from prefill_sweep import Records, expected_rows


@dataclass(frozen=True)
class Product:
    """One fused linear of a layer: y = base(x) and its delta; `read` is what follows."""

    library: Library
    weight: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    read: torch.Tensor
    added: tuple[Any, torch.Tensor]  # arguments and workspace
    whole: tuple[Any, torch.Tensor]

    def base(self) -> None:
        torch.mm(self.x, self.weight.T, out=self.y)

    def call(self, arguments: tuple[Any, torch.Tensor]) -> None:
        self.library.delta_gemm(arguments[0], torch.cuda.current_stream().cuda_stream)


def base(product: Product) -> None:
    product.base()


def one_stream(product: Product) -> None:
    product.base()
    product.call(product.added)


def in_the_call(product: Product) -> None:
    product.call(product.whole)


LAYOUTS: dict[str, Callable[[Product], None]] = {"base": base, "one stream": one_stream, "in the call": in_the_call}


def run(product: Product, layout: str) -> None:
    """A layout's product, and who reads it."""
    LAYOUTS[layout](product)
    torch.mul(product.y, 1, out=product.read)


def products_of(
    library: Library, tenants: delta_gemm.Tenants, step: Step, tokens: int, dtype: torch.dtype
) -> dict[str, list[Product]]:
    """Of each group, in all layers."""
    groups = {}
    for name, (features, slices) in delta_gemm.GROUPS.items():
        widths = [out for out, _ in slices]
        x = torch.randn((tokens, features), device="cuda").to(dtype)
        y, read = (torch.zeros((tokens, sum(widths)), device="cuda", dtype=dtype) for _ in range(2))
        group = []
        for layer in range(tenants.layers):
            weight = torch.randn((sum(widths), features), device="cuda", dtype=dtype) * 0.01
            indices = [tenants.index[layer, name, place] for place in range(len(widths))]
            outputs = list(zip(indices, y.split(widths, 1), strict=True))
            added, whole = (step.product(x, outputs, base) for base in ((), weight.split(widths)))
            group.append(Product(library, weight, x, y, read, added, whole))
        groups[name] = group
    return groups


def largest_error(groups: dict[str, list[Product]], records: Records, layout: str) -> float:
    """Of a layer's sums, over the size of the delta."""
    worst = 0.0
    for name, (features, slices) in delta_gemm.GROUPS.items():
        product = groups[name][0]
        product.y.fill_(float("nan"))
        run(product, layout)
        delta = torch.cat([expected_rows(records[out, features], product.x) for out, _ in slices], dim=1)
        expected = product.x.double() @ product.weight.double().T + delta
        worst = max(worst, float((product.read.double() - expected).norm() / delta.norm()))
    return worst


def milliseconds(groups: dict[str, list[Product]], layout: str) -> float:
    """Of these groups in 32 layers as one graph; layers come again where there are fewer."""
    layers = list(zip(*groups.values(), strict=True))

    def work() -> None:
        for number in range(delta_gemm.LAYERS):
            for product in layers[number % len(layers)]:
                run(product, layout)

    return delta_gemm.median_ms(work)


def measured(groups: dict[str, list[Product]], records: Records, tokens: int) -> dict[str, Any]:
    """A line, but for what it is of."""
    layouts = [layout for layout in LAYOUTS if layout != "in the call" or tokens <= BASE_TOKENS]
    error = max(largest_error(groups, records, layout) for layout in layouts if layout != "base")
    whole = {layout: round(milliseconds(groups, layout), 4) for layout in layouts}
    parts = {
        name: {layout: round(1e3 * milliseconds({name: group}, layout) / delta_gemm.LAYERS, 2) for layout in layouts}
        for name, group in groups.items()
    }
    return {"ms": whole, "us": parts, "error_over_delta": error}


def tenants_of(library: Library, count: int, records: Records) -> delta_gemm.Tenants:
    """As many layers as make the weights many times the L2."""
    return delta_gemm.Tenants(library, count, max(2, min(16, 64 // count)), records)


def drawn_records() -> Records:
    """One of each shape."""
    rng = np.random.default_rng(0)
    shapes = {(out, size): bands for size, slices in delta_gemm.GROUPS.values() for out, bands in slices}
    return {shape: RandomRecord.draw(rng, shape, bands) for shape, bands in shapes.items()}


def main() -> None:
    """Measures every number of tenants; prints and writes lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file that lines are added to")
    parser.add_argument("library", type=Path, help="build of libdeltaweave")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    arguments = parser.parse_args()
    if not arguments.library.is_file():
        parser.error(f"{arguments.library}: no such library")
    library, records = Library(arguments.library), drawn_records()
    with arguments.output.open("a") as lines:
        for count in arguments.tenants:
            tenants = tenants_of(library, count, records)
            step = Step(tenants.arena, torch.arange(count, dtype=torch.int32))
            step.make_plan()
            groups = products_of(library, tenants, step, count, getattr(torch, arguments.dtype))
            row = {"tenants": count, "dtype": arguments.dtype, **measured(groups, records, count)}
            print(json.dumps(row), file=lines, flush=True)
            print(json.dumps(row), flush=True)
            del tenants, groups
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
