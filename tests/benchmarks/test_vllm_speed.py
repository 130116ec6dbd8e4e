# SPDX-License-Identifier: Apache-2.0
"""Turns of the servers that vLLM's benchmark runs beside each other: who measures is alone, and every turn ends."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "vllm"
BEGIN = """
import os, sys
from fcntl import LOCK_EX, LOCK_SH
from pathlib import Path
from speed import turn

folder = Path(sys.argv[1])
print("asks", flush=True)
"""
HOLDS = """
with turn(folder, {mode}):
    print("has it", flush=True)
    os.read(0, 1)
"""
# As vLLM does: the engine is forked inside, and lives on.
FORKS = """
with turn(folder, LOCK_SH):
    if os.fork() == 0:
        os.read(0, 1)
        os._exit(0)
print("is out", flush=True)
os.read(0, 1)
"""
WAIT = 30
Server = subprocess.Popen[bytes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts a process that has asked for its turn; it ends, with its children, when its input is closed."""
    servers: list[Server] = []

    def begin(code: str) -> Server:
        command = [sys.executable, "-c", BEGIN + code, str(tmp_path)]
        server = subprocess.Popen(command, cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        servers.append(server)
        assert says(server, WAIT) == "asks"
        return server

    yield begin
    for server in servers:
        assert server.stdin and server.stdout
        server.stdin.close()
    for server in servers:
        server.wait(WAIT)
        server.stdout.close()


def says(server: Server, seconds: float) -> str | None:
    """Its next line, if that comes in time."""
    assert server.stdout
    ready, _, _ = select.select([server.stdout], [], [], seconds)  # not buffered, so that it sees every line
    return server.stdout.readline().decode().strip() if ready else None


def test_a_turn_ends_though_the_engine_that_was_forked_in_it_lives(start: Callable[[str], Server]) -> None:
    assert says(start(FORKS), WAIT) == "is out"
    assert says(start(HOLDS.format(mode="LOCK_EX")), 5) == "has it"


@pytest.mark.parametrize(("first", "second"), [("LOCK_SH", "LOCK_EX"), ("LOCK_EX", "LOCK_SH"), ("LOCK_EX", "LOCK_EX")])
def test_who_measures_is_alone(start: Callable[[str], Server], first: str, second: str) -> None:
    holder = start(HOLDS.format(mode=first))
    assert says(holder, WAIT) == "has it"
    other = start(HOLDS.format(mode=second))
    assert says(other, 0.3) is None
    assert holder.stdin
    holder.stdin.close()
    assert says(other, WAIT) == "has it"


def test_servers_start_together(start: Callable[[str], Server]) -> None:
    assert [says(start(HOLDS.format(mode="LOCK_SH")), WAIT) for _ in range(2)] == ["has it"] * 2
