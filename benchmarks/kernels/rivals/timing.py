# SPDX-License-Identifier: Apache-2.0
"""Times of device work: medians over replays of a CUDA graph, and the copy rate of the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from deltaweave.runtime_plugin.pytorch.context_switch import context_switch

__all__ = ["Timing", "copy_rate", "event_ms", "graph_timing"]

TARGET_MS = 60.0
MOST_REPEATS = 15
FEWEST_REPEATS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, the fastest, the slowest, and how many were measured."""

    median: float
    fastest: float
    slowest: float
    repeats: int


def graph_timing(work: Callable[[], None]) -> Timing:
    """Times replays of a graph of `work`, which must have run once before (compilers, allocators, handles)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    context_switch(torch.cuda.current_device())()  # captures change streams
    graph.replay()
    first = event_ms(graph.replay)
    repeats = max(FEWEST_REPEATS, min(MOST_REPEATS, int(TARGET_MS / max(first, 1e-3))))
    times = [event_ms(graph.replay) for _ in range(repeats)]
    return Timing(statistics.median(times), min(times), max(times), repeats)


def event_ms(work: Callable[[], object]) -> float:
    """One run between two events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def copy_rate() -> float:
    """Bytes read plus written a second by a device copy of 4 GB; no graph, whose copies may go another way."""
    source = torch.randn((1 << 30,), device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    for _ in range(10):
        copy()
    return 2 * source.nbytes / statistics.median(event_ms(copy) for _ in range(MOST_REPEATS)) * 1e3
