# SPDX-License-Identifier: Apache-2.0
"""Turns of servers that share GPUs: whoever measures is alone on its own."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["all_gpus", "mark_file", "turn", "turn_file", "wait_for_marks"]


@contextmanager
def turn(folder: Path, mode: int, gpus: Iterable[str]) -> Iterator[None]:
    """Nobody measures on these GPUs meanwhile; with `LOCK_EX` nobody else starts or loads either.

    The engine that vLLM forks inside shares the open files, so that closing them here would leave the locks to the
    engine.
    """
    with ExitStack() as stack:
        for gpu in sorted(gpus):  # in one order for all, so that no two wait for each other
            file = stack.enter_context(turn_file(folder, gpu).open("a"))
            fcntl.flock(file, mode)
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
        yield


def turn_file(folder: Path, gpu: str) -> Path:
    return folder / f"measuring-{gpu}"


def all_gpus(folder: Path) -> list[str]:
    """Those that some server of this run may be on."""
    return [file.name.removeprefix("measuring-") for file in folder.glob("measuring-*")]


def mark_file(folder: Path, server: str) -> Path:
    """Is there when the server has measured all that others wait for, or has ended."""
    return folder / f"{server}.measured"


def wait_for_marks(folder: Path, servers: Iterable[str]) -> None:
    """Until each of these has measured; whoever waits is stopped by its own time limit."""
    for server in servers:
        while not mark_file(folder, server).exists():
            time.sleep(0.2)
