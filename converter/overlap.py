# SPDX-License-Identifier: Apache-2.0
"""Threads beside the one that drives a GPU: the next matrices are read and decomposed, the last results are written.

On the CPU there is nothing to overlap with: every call is made in its place, in the order of the program.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from threading import Lock
from typing import TypeVar

import torch

__all__ = ["Overlap", "hand_over"]

Item = TypeVar("Item")
Result = TypeVar("Result")


# Threads that make items ahead. An eigenproblem keeps a GPU waiting more than working, and two of them fill its gaps.
THREADS_AHEAD = 2


class Overlap:
    """Threads with one kind of work each; left by an error, it waits for what runs and drops the rest."""

    def __init__(self, prepare: Callable[[], object] | None) -> None:
        """Makes threads that each call `prepare` first; None makes none."""
        self._prepare, self._threads = prepare, ExitStack()
        self._ahead, self._writer, self._aside = self._pool(THREADS_AHEAD), self._pool(), self._pool()
        self._written: Future[None] | None = None
        self._writing = Lock()

    @classmethod
    def beside(cls, device: torch.device) -> Overlap:
        """Threads if `device` is a GPU, none else."""
        if device.type != "cuda":
            return cls(None)
        torch.linalg.eigh(torch.eye(2, device=device))  # loads PyTorch's solvers, which two threads at once cannot
        return cls(partial(_own_stream, device))

    def __enter__(self) -> Overlap:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def ahead(
        self, function: Callable[[Item], Result], items: Iterable[Item], most: int = THREADS_AHEAD
    ) -> Iterator[Result]:
        """`function` of every item, in their order, up to `most` items ahead, each on a GPU stream of its thread.

        Tensors in what it returns must have been handed over, see `hand_over`.
        """
        if self._ahead is None:
            return map(function, items)
        waiting = iter(items)
        begun = deque(self._ahead.submit(function, item) for item in islice(waiting, most))
        return self._results(self._ahead, function, waiting, begun)

    def aside(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """Begins work that needs no GPU; what is returned waits for its result. On the CPU, that begins it."""
        return function if self._aside is None else self._aside.submit(function).result

    def write(self, function: Callable[[], None]) -> None:
        """Writes behind the work, in order, whichever thread asks. One write is under way: it holds what it writes."""
        if self._writer is None:
            function()
            return
        with self._writing:
            self.flush()
            self._written = self._writer.submit(function)

    def flush(self) -> None:
        """Waits until everything is written, and raises what went wrong."""
        if self._written is not None:
            self._written.result()

    def _pool(self, threads: int = 1) -> ThreadPoolExecutor | None:
        if self._prepare is None:
            return None
        pool = ThreadPoolExecutor(threads, initializer=self._prepare)
        self._threads.callback(pool.shutdown, cancel_futures=True)
        return pool

    @staticmethod
    def _results(
        pool: ThreadPoolExecutor,
        function: Callable[[Item], Result],
        waiting: Iterator[Item],
        begun: deque[Future[Result]],
    ) -> Iterator[Result]:
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(function, item) for item in islice(waiting, 1))
            yield result


def hand_over(*tensors: torch.Tensor) -> None:
    """Makes what a thread's own stream computed complete, and fit to be used on a GPU's default stream."""
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    for tensor in on_gpu:
        tensor.record_stream(torch.cuda.default_stream(tensor.device))
    if on_gpu:
        torch.cuda.current_stream(on_gpu[0].device).synchronize()


def _own_stream(device: torch.device) -> None:
    """What this thread asks of the GPU runs between the large kernels of the main thread, not behind all of them."""
    torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))
