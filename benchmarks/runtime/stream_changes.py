# SPDX-License-Identifier: Apache-2.0
"""What kernels of other streams cost a CUDA graph from then on, and what a switch of contexts gives back.

    python benchmarks/runtime/stream_changes.py --output results/stream_changes.json --plot results

The graph is a decode step of Llama-2-7B's linears by torch, 384 kernels in line. It is replayed in one stream; between
measurements something small happens, 24 times each: a kernel in the same stream, a copy in another one, a kernel in
another one, alternately of three. Before each of these, and last, comes a switch of contexts (`context_switch`). Then
switches come while replays are under way. Nothing else may run on the GPU: other processes switch its contexts too.
About 15 seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from deltaweave.runtime_plugin.pytorch.context_switch import HOPPER, context_switch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from results_file import circumstances, write_result
from rivals.timing import event_ms

HIDDEN, WIDE, LAYERS = 4096, 11008, 32
TIMES, REPLAYS = 24, 10
BF16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}


class DecodeStep:
    """One token through linears and what stands between them, captured; y are its outputs."""

    def __init__(self) -> None:
        shapes = ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE))
        self._layers = [[torch.randn(shape, **BF16) * 0.01 for shape in shapes] for _ in range(LAYERS)]
        self._x = torch.randn(1, HIDDEN, **BF16)
        self._compute()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = self._compute()

    def _compute(self) -> torch.Tensor:
        hidden = self._x
        for qkv, out, up, down in self._layers:
            hidden = hidden + torch.mm(torch.mm(hidden, qkv.t())[:, :HIDDEN] * 0.5, out.t())
            wide = torch.mm(hidden * 0.99, up.t())
            hidden = hidden + torch.mm(torch.nn.functional.silu(wide[:, :WIDE]) * wide[:, WIDE:], down.t())
        return hidden

    def replay_us(self) -> float:
        """The better of two runs, one behind another."""
        return 1e3 * min(event_ms(self._replays) for _ in range(2)) / REPLAYS

    def _replays(self) -> None:
        for _ in range(REPLAYS):
            self.graph.replay()


def acts() -> dict[str, Callable[[], None]]:
    """What happens between measurements, once."""
    streams = cycle([torch.cuda.Stream() for _ in range(3)])
    numbers, host = torch.ones(1000, device="cuda"), torch.ones(1000).pin_memory()

    def elsewhere(act: Callable[[], Any]) -> None:
        with torch.cuda.stream(next(streams)):
            act()
        torch.cuda.synchronize()

    return {
        "kernel, same stream": lambda: (numbers.mul_(1), torch.cuda.synchronize())[0],
        "copy, other stream": lambda: elsewhere(lambda: numbers.copy_(host, non_blocking=True)),
        "kernel, other stream": lambda: elsewhere(lambda: numbers.mul_(1)),
    }


def measured(step: DecodeStep, switch: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Microseconds of a replay after each act; a switch comes before each kind of them, and after the last."""
    for name, act in acts().items():
        switch()
        for count in range(TIMES + 1):
            if count:
                act()
            yield {"act": name, "times": count, "replay_us": round(step.replay_us(), 1)}
    switch()
    yield {"act": "switch", "times": TIMES + 1, "replay_us": round(step.replay_us(), 1)}


def switch_us(step: DecodeStep, switch: Callable[[], None]) -> float:
    """What a switch takes of the device's time, behind every replay of a line of them; the host is two ahead."""

    def replays(*, switching: bool) -> None:
        ends = []
        for number in range(4 * REPLAYS):
            step.graph.replay()
            ends.append(torch.cuda.Event())
            ends[-1].record()
            if number > 1:
                ends[number - 2].synchronize()
            if switching:
                switch()

    with_them, without = (min(event_ms(lambda on=on: replays(switching=on)) for _ in range(3)) for on in (True, False))
    return 1e3 * (with_them - without) / (4 * REPLAYS)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in dict.fromkeys(row["act"] for row in rows):
        points = [(row["times"], row["replay_us"] / 1e3) for row in rows if row["act"] == name]
        marker = {"marker": "*", "markersize": 14, "linestyle": ""} if name == "switch" else {"marker": "."}
        label = "then a switch of contexts" if name == "switch" else name
        axes.plot(*zip(*points, strict=True), label=label, **marker)
    axes.set(xlabel="how often, so far", ylabel="ms of a replay", title="One CUDA graph, 384 kernels in line")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="folder of the plot")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != HOPPER:
        parser.error("contexts are switched on a GPU of compute capability 9.0, of which there is none")
    torch.cuda.set_stream(torch.cuda.Stream())
    step = DecodeStep()
    free, began = torch.cuda.mem_get_info()[0], time.monotonic()
    switch = context_switch(torch.cuda.current_device())
    made = time.monotonic() - began
    taken = free - torch.cuda.mem_get_info()[0]
    rows = list(measured(step, switch))
    context = {
        "switch_us": round(switch_us(step, switch), 1),
        "mib": round(taken / (1 << 20)),
        "made_in_ms": round(1e3 * made, 1),
    }
    for row in rows:
        print(f"{row['times']:3} x {row['act']:22} {row['replay_us']:8.1f} us")
    print(context)
    write_result(arguments.output, {**circumstances(), "kernels": 12 * LAYERS, "context": context, "rows": rows})
    if arguments.plot:
        plot(rows, arguments.plot / "stream_changes.png")


if __name__ == "__main__":
    main()
