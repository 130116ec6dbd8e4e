# SPDX-License-Identifier: Apache-2.0
"""What deltas add to a decode step's products of the base, by how the two are laid over streams.

    python benchmarks/kernels/beside_sweep.py OUTPUT.jsonl build/sm90/cuda/libdeltaweave.so [--dtype bfloat16]

Llama-2-7B's linears for 1, 8, 32 and 128 tokens of as many tenants: the base's products (torch.mm), the deltas, and
behind each product a kernel that reads its outputs once, as an activation or a norm does; 32 layers as one CUDA graph.
A line of JSON a number of tenants: ms of every layout. The results of each are checked against float64 on the GPU.
About a second a line.

base            products of the base alone
one stream      base, delta added to its y, one after the other
stage 1 beside  the first stage on a second stream beside the base, the second behind both
beside          both stages on a second stream beside the base, into a z of their own; the kernel behind reads y + z
beside, added   the same with a kernel more that adds z to y
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import delta_gemm
import numpy as np
import torch
from deltaweave.runtime_plugin.library import Library
from deltaweave.runtime_plugin.pytorch.second_stream import SecondStream
from device_arena import Step
from factored_records import RandomRecord
from prefill_sweep import Records, expected_rows


@dataclass(frozen=True)
class Product:
    """One fused linear of a layer: y = base(x), and its delta, added to y or written into z; `read` is what follows."""

    library: Library
    weight: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    read: torch.Tensor
    into_y: tuple[Any, torch.Tensor]  # arguments and workspace
    into_z: tuple[Any, torch.Tensor]

    def base(self) -> None:
        torch.mm(self.x, self.weight.T, out=self.y)

    def shrink(self, gemm: tuple[Any, torch.Tensor]) -> None:
        self.library.delta_shrink(gemm[0], torch.cuda.current_stream().cuda_stream)

    def expand(self, gemm: tuple[Any, torch.Tensor]) -> None:
        self.library.delta_expand(gemm[0], torch.cuda.current_stream().cuda_stream)

    def delta(self) -> None:
        self.shrink(self.into_z)
        self.expand(self.into_z)


def base(product: Product, second: SecondStream) -> None:
    product.base()
    torch.mul(product.y, 1, out=product.read)


def one_stream(product: Product, second: SecondStream) -> None:
    product.base()
    product.shrink(product.into_y)
    product.expand(product.into_y)
    torch.mul(product.y, 1, out=product.read)


def stage_1_beside(product: Product, second: SecondStream) -> None:
    second.beside(len(product.x), product.base, partial(product.shrink, product.into_y))
    product.expand(product.into_y)
    torch.mul(product.y, 1, out=product.read)


def both_beside(product: Product, second: SecondStream) -> None:
    second.beside(len(product.x), product.base, product.delta)
    torch.add(product.y, product.z, out=product.read)


def both_beside_and_added(product: Product, second: SecondStream) -> None:
    second.beside(len(product.x), product.base, product.delta)
    product.y.add_(product.z)
    torch.mul(product.y, 1, out=product.read)


LAYOUTS: dict[str, Callable[[Product, SecondStream], None]] = {
    "base": base,
    "one stream": one_stream,
    "stage 1 beside": stage_1_beside,
    "beside": both_beside,
    "beside, added": both_beside_and_added,
}


def products_of(
    library: Library, tenants: delta_gemm.Tenants, step: Step, tokens: int, dtype: torch.dtype
) -> list[list[Product]]:
    """Of each layer, in the order of a step."""
    groups = []
    for name, (features, slices) in delta_gemm.GROUPS.items():
        widths = [out for out, _ in slices]
        x = torch.randn((tokens, features), device="cuda").to(dtype)
        y, z, read = (torch.zeros((tokens, sum(widths)), device="cuda", dtype=dtype) for _ in range(3))
        group = []
        for layer in range(tenants.layers):
            indices = [tenants.index[layer, name, place] for place in range(len(widths))]
            into_y, into_z = (step.product(x, list(zip(indices, to.split(widths, 1), strict=True))) for to in (y, z))
            into_z[0].overwrite = 1
            weight = torch.randn((sum(widths), features), device="cuda", dtype=dtype) * 0.01
            group.append(Product(library, weight, x, y, z, read, into_y, into_z))
        groups.append(group)
    return [list(layer) for layer in zip(*groups, strict=True)]


def errors(layer: list[Product], records: Records, layout: str, second: SecondStream) -> float:
    """The largest error of a layer's sums, over the size of the delta."""
    worst = 0.0
    for product, (features, slices) in zip(layer, delta_gemm.GROUPS.values(), strict=True):
        product.y.fill_(float("nan"))
        product.z.fill_(float("nan"))
        LAYOUTS[layout](product, second)
        delta = torch.cat([expected_rows(records[out, features], product.x) for out, _ in slices], dim=1)
        expected = product.x.double() @ product.weight.double().T + delta
        worst = max(worst, float((product.read.double() - expected).norm() / delta.norm()))
    return worst


def step_ms(layers: list[list[Product]], layout: str, second: SecondStream) -> float:
    """Of 32 layers in one graph; layers come again where there are fewer."""

    def work() -> None:
        for number in range(delta_gemm.LAYERS):
            for product in layers[number % len(layers)]:
                LAYOUTS[layout](product, second)

    return delta_gemm.median_ms(work)


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
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    arguments = parser.parse_args()
    if not arguments.library.is_file():
        parser.error(f"{arguments.library}: no such library")
    library, records, second = Library(arguments.library), drawn_records(), SecondStream(torch.device("cuda"))
    with arguments.output.open("a") as lines:
        for count in arguments.tenants:
            tenants = tenants_of(library, count, records)
            step = Step(tenants.arena, torch.arange(count, dtype=torch.int32))
            step.make_plan()
            layers = products_of(library, tenants, step, count, getattr(torch, arguments.dtype))
            error = max(errors(layers[0], records, layout, second) for layout in LAYOUTS if layout != "base")
            times = {layout: round(step_ms(layers, layout, second), 4) for layout in LAYOUTS}
            row = {"tenants": count, "dtype": arguments.dtype, "ms": times, "error_over_delta": error}
            print(json.dumps(row), file=lines, flush=True)
            print(json.dumps(row), flush=True)
            del tenants, layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
