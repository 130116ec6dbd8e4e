# SPDX-License-Identifier: Apache-2.0
"""Seconds by part of one compression, taken by wrapping the converter's own functions from outside.

A part has two clocks: its thread's, and on a GPU that of the stream it runs on, which goes on when the thread has left.
Threads work at the same time, so the parts of all threads together are more than the whole.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Part", "Parts"]

# Module (or module:class), function, what the table calls it. What is indented is inside of what stands above it.
WRAPPED = (
    ("compress", "plan_compression", "open and plan"),
    ("text:CalibrationData", "load", "tokenize"),
    ("calibration:BlockStream", "__init__", "build the model's skeleton"),
    ("calibration:BlockStream", "embed", "embed"),
    ("compress:_Compressions", "of", "measure sensitivities"),
    ("measuring:Measurement", "tables", "  measure"),
    ("sensitivity", "_head_gradients", "    gradients of the head"),
    ("sensitivity", "_layer_sensitivity", "    backward and moments of a layer"),
    ("measuring", "distortion_table", "    round every vector at every width"),
    ("compress", "allocate", "choose bits"),
    ("calibration:BlockStream", "load", "read a block's norms"),
    ("calibration:BlockStream", "second_moment", "calibration: forward and second moments"),
    ("layers", "stage_moments", "calibration: both models' forward, moments"),
    ("calibration", "add_gram", "  second moments alone"),
    ("drift", "_add_products", "  moments of the input and of drift alone"),
    ("layers:LayerCompression", "_through_half", "forward to the next half of a layer"),
    ("layers", "compress_stage", "quantize"),
    ("projection", "_quantize_v", "  V"),
    ("projection", "_quantize_u", "  U, its second moment included"),
    ("gptq", "inverse_factor", "    inverse factors of both"),
    ("projection", "_errors", "  errors"),
    ("quantize:QuantizedRows", "packed", "  pack codes, copy to the host"),
    ("layers:LayerCompression", "_difference", "ahead: read, subtract, decompose"),
    ("decompositions:Decompositions", "factors", "  SVD, or vectors read back"),
    ("decompositions", "short_vectors", "    eigenproblems"),
    ("decompositions", "_save", "behind: keep vectors"),
    ("overlap:Overlap", "flush", "wait for the writer"),
    ("workspace:Workspace", "save", "behind: write a part"),
    ("calibration:Activations", "save", "behind: save activations"),
    ("compress:_Run", "_others", "aside: norms, embeddings, lm_head"),
    ("checkpoint:Checkpoint", "identity", "aside: hash the base"),
    ("compress", "package", "write the delta"),
)
WAIT = "wait for what is made ahead"


@dataclass
class Part:
    """Calls and seconds of one part."""

    name: str
    calls: int = 0
    host_seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @property
    def stream_seconds(self) -> float | None:
        """Seconds on the GPU's stream; None without a GPU."""
        return sum(start.elapsed_time(stop) for start, stop in self.events) / 1e3 if self.events else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to milliseconds."""
        stream = self.stream_seconds
        return {
            "part": self.name,
            "calls": self.calls,
            "host_seconds": round(self.host_seconds, 3),
            "stream_seconds": None if stream is None else round(stream, 3),
        }


class Parts:
    """The clocks of all parts."""

    def __init__(self) -> None:
        """Wraps the converter's functions; there is no way back."""
        self._lock = threading.Lock()
        self.parts = {name: Part(name) for *_, name in WRAPPED} | {WAIT: Part(WAIT)}
        for where, function, name in WRAPPED:
            module, _, owner = where.partition(":")
            home = importlib.import_module(f"deltaweave.converter.{module}")
            target = getattr(home, owner) if owner else home
            wrapped = self._timed(getattr(target, function), name)
            # A class method is bound when it is taken, so it is put back as a static one.
            is_bound = owner and hasattr(getattr(target, function), "__self__")
            setattr(target, function, staticmethod(wrapped) if is_bound else wrapped)
        overlap = importlib.import_module("deltaweave.converter.overlap").Overlap
        overlap.ahead = self._timed_steps(overlap.ahead)

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with _Clock(self, name):
                return function(*arguments, **options)

        return timed

    def _timed_steps(self, ahead: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def timed(*arguments: Any) -> Iterator[Any]:
            steps = ahead(*arguments)  # now, as the work begins with the call

            def taken() -> Iterator[Any]:
                while True:
                    with _Clock(self, WAIT):
                        step = next(steps, None)
                    if step is None:
                        return
                    yield step

            return taken()

        return timed

    def add(self, name: str, seconds: float, events: tuple[torch.cuda.Event, torch.cuda.Event] | None) -> None:
        """Counts one call."""
        with self._lock:
            part = self.parts[name]
            part.calls += 1
            part.host_seconds += seconds
            if events:
                part.events.append(events)

    def to_json(self) -> list[dict[str, Any]]:
        """All parts that were called."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [part.to_json() for part in self.parts.values() if part.calls]


class _Clock:
    def __init__(self, parts: Parts, name: str) -> None:
        self._parts, self._name = parts, name
        self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if _on_gpu() else None

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        if self._events:
            self._events[0].record()

    def __exit__(self, *_: object) -> None:
        if self._events:
            self._events[1].record()
        self._parts.add(self._name, time.perf_counter() - self._start, self._events)


def _on_gpu() -> bool:
    return torch.cuda.is_initialized()
