# SPDX-License-Identifier: Apache-2.0
"""How long a decode step takes, and what its time goes into on the device: kernels, and gaps between them.

For `one_server.py`. A step's time is that from its begin to the next one's, in the middle of a run: the worker's host
is a step ahead of the device and waits for it.

A few steps in the middle of a run are traced in the worker, CUDA graphs kernel by kernel. Kernels may overlap, for some
begin before those in front of them have ended: each is given the time by which it moves the end of the work done, and
the time before it in which nothing ran. These add up to the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["SKIPPED", "TRACED", "begin_clock", "begin_trace", "end_clock", "end_trace"]

# Decode steps before the first that is traced, and those that are.
SKIPPED, TRACED = 6, 8
SHOWN = 28
# Greedy sampling, once a step and the last of what takes time in it.
STEP_ENDS = "ArgMax"


@dataclass
class Share:
    """One kernel's part of all traced steps, in microseconds."""

    launches: int = 0
    advanced: float = 0.0
    duration: float = 0.0
    gap_before: float = 0.0


def _before_steps(worker: Any, sequences: int, act: Callable[[], None]) -> Any:
    """Does something before every step in which so many sequences have one token each; what the worker had before."""
    runner = worker.model_runner
    execute = runner.execute_model

    def acting(scheduled: Any, *arguments: Any, **more: Any) -> Any:
        if scheduled.total_num_scheduled_tokens == len(scheduled.num_scheduled_tokens) == sequences:
            act()
        return execute(scheduled, *arguments, **more)

    runner.execute_model = acting
    return execute


def begin_clock(worker: Any, sequences: int) -> None:
    """In the worker: notes when the steps to come begin in which so many sequences have one token each."""
    times: list[float] = []
    execute = _before_steps(worker, sequences, lambda: times.append(time.monotonic()))
    worker.deltaweave_clock = times, execute


def end_clock(worker: Any) -> float:
    """In the worker: milliseconds from one step's begin to the next one's, but for the first and the last few."""
    times, worker.model_runner.execute_model = worker.deltaweave_clock
    steady = times[SKIPPED:-SKIPPED]
    if len(steady) < 2:
        raise RuntimeError(f"{len(times)} steps of one token a sequence, expected more than {2 * SKIPPED + 1}")
    return 1e3 * (steady[-1] - steady[0]) / (len(steady) - 1)


def begin_trace(worker: Any, sequences: int) -> None:
    """In the worker: traces a few of the steps to come in which so many sequences have one token each."""
    import torch

    if not torch.cuda.is_available():
        return
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen in (SKIPPED, SKIPPED + TRACED):
            torch.cuda.synchronize()
            profile.start() if seen == SKIPPED else profile.stop()

    worker.deltaweave_trace = profile, _before_steps(worker, sequences, count)


def end_trace(worker: Any) -> dict[str, Any]:
    """In the worker: the step's time, and its kernels' parts of it."""
    import torch

    if not torch.cuda.is_available():
        return {}
    profile, worker.model_runner.execute_model = worker.deltaweave_trace
    device = torch.autograd.DeviceType.CUDA
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == device
    ]
    return shares(events)


def shares(events: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """Between the end of the first step and that of the last.

    Args:
        events: (name, start, end) of kernels and copies, in microseconds.
    """
    ordered = sorted(events, key=lambda event: event[1])
    ends = [end for name, _, end in ordered if STEP_ENDS in name]
    if len(ends) < 2:
        return {"note": f"{len(ends)} of {len(ordered)} events end a step"}
    steps, done, found = len(ends) - 1, ends[0], dict[str, Share]()
    for name, start, end in ordered:
        if end <= ends[0] or end > ends[-1]:
            continue
        share = found.setdefault(name[:140], Share())
        share.launches += 1
        share.duration += end - start
        share.gap_before += max(0.0, start - done)
        share.advanced += max(0.0, end - max(start, done))
        done = max(done, end)
    largest = sorted(found, key=lambda name: found[name].advanced + found[name].gap_before, reverse=True)
    return {
        "step_us": (ends[-1] - ends[0]) / steps,
        "gaps_us": sum(share.gap_before for share in found.values()) / steps,
        "launches": sum(share.launches for share in found.values()) / steps,
        "kernels": [
            {
                "name": name,
                "launches": round(found[name].launches / steps, 2),
                "us": round(found[name].advanced / steps, 1),
                "gap_before_us": round(found[name].gap_before / steps, 1),
                "duration_us": round(found[name].duration / steps, 1),
            }
            for name in largest[:SHOWN]
        ],
    }
