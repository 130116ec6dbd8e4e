# SPDX-License-Identifier: Apache-2.0
"""Turns of servers that share GPUs: whoever measures is alone on its own."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["all_gpus", "turn", "turn_file"]


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
