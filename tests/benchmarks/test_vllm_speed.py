# SPDX-License-Identifier: Apache-2.0
"""Turns of the servers that vLLM's benchmark runs beside each other: who measures is alone, and every turn ends."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "vllm"
sys.path.insert(0, str(SCRIPTS))
from speed import take, with_room  # noqa: E402
from step_kernels import SKIPPED, begin_clock, end_clock, shares  # noqa: E402
from turns import mark_file, turn_file, wait_for_marks  # noqa: E402

BEGIN = """
import os, sys
from fcntl import LOCK_EX, LOCK_SH
from pathlib import Path
from turns import all_gpus, turn, turn_file

folder = Path(sys.argv[1])
print("asks", flush=True)
"""
HOLDS = """
with turn(folder, {mode}, {gpus}):
    print("has it", flush=True)
    os.read(0, 1)
"""
# As vLLM does: the engine is forked inside, and lives on.
FORKS = """
with turn(folder, LOCK_SH, "01"):
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
    assert says(start(HOLDS.format(mode="LOCK_EX", gpus="'10'")), 5) == "has it"


@pytest.mark.parametrize(("first", "second"), [("LOCK_SH", "LOCK_EX"), ("LOCK_EX", "LOCK_SH"), ("LOCK_EX", "LOCK_EX")])
def test_who_measures_is_alone(start: Callable[[str], Server], first: str, second: str) -> None:
    holder = start(HOLDS.format(mode=first, gpus="'01'"))
    assert says(holder, WAIT) == "has it"
    other = start(HOLDS.format(mode=second, gpus="'1'"))
    assert says(other, 0.3) is None
    assert holder.stdin
    holder.stdin.close()
    assert says(other, WAIT) == "has it"


def test_servers_start_together(start: Callable[[str], Server], tmp_path: Path) -> None:
    for gpu in "01":
        turn_file(tmp_path, gpu).touch()
    begun = [start(HOLDS.format(mode="LOCK_SH", gpus="all_gpus(folder)")) for _ in range(2)]
    assert [says(server, WAIT) for server in begun] == ["has it"] * 2
    for gpu in "01":
        assert says(start(HOLDS.format(mode="LOCK_EX", gpus=f"'{gpu}'")), 0.3) is None


def test_servers_of_two_gpus_measure_together(start: Callable[[str], Server]) -> None:
    assert [says(start(HOLDS.format(mode="LOCK_EX", gpus=f"'{gpu}'")), WAIT) for gpu in "01"] == ["has it"] * 2


def test_who_comes_later_waits_for_the_marks_of_those_before(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(wait_for_marks, tmp_path, ["stock", "deltaweave"])
        for server in ("stock", "deltaweave"):
            assert wait([waits], 0.5).not_done
            mark_file(tmp_path, server).touch()
        waits.result(WAIT)


def test_servers_go_where_there_is_most_room() -> None:
    free = {"0": 78.0, "1": 78.0}
    for server, gpus in {"lora256": ["0"], "deltaweave": ["1"], "stock": ["1"]}.items():
        assert with_room(free, server, 1, alone=False) == gpus
        take(free, server, gpus)
    assert with_room(free, "stock", 1, alone=False) is None
    assert with_room(free, "stock", 2, alone=False) is None
    take(free, "stock", ["1"], sign=-1)
    assert with_room(free, "stock", 2, alone=False) == ["0", "1"]
    assert with_room({"0": 0.0}, "stock", 1, alone=True) == ["0"]


def test_a_step_is_made_of_its_kernels_and_gaps() -> None:
    """Two steps of 100 us: a product, a kernel that begins before its end, a gap of 10, sampling; what lies outside."""
    events = [("sample_ArgMax", -20.0, 0.0), ("before", -30.0, -20.0)]
    for start in (0.0, 100.0):
        events += [("product", start, start + 50.0), ("early", start + 40.0, start + 70.0)]
        events += [("sample_ArgMax", start + 80.0, start + 100.0)]
    found = shares([*events, ("after", 200.0, 230.0)])
    assert found["step_us"] == 100 and found["gaps_us"] == 10 and found["launches"] == 3
    assert {
        kernel["name"]: (kernel["us"], kernel["gap_before_us"], kernel["duration_us"]) for kernel in found["kernels"]
    } == {
        "product": (50, 0, 50),
        "early": (20, 0, 30),
        "sample_ArgMax": (20, 10, 20),
    }
    assert sum(kernel["us"] + kernel["gap_before_us"] for kernel in found["kernels"]) == found["step_us"]
    assert "note" in shares([("product", 0.0, 1.0)])


class Runner:
    """vLLM's, as far as steps are timed: each takes a while by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("step_kernels.time", SimpleNamespace(monotonic=lambda: self.now))

    def execute_model(self, scheduled: SimpleNamespace) -> str:
        self.now += scheduled.seconds
        return "done"


def step(sequences: int, seconds: float, tokens: int | None = None) -> SimpleNamespace:
    each = dict.fromkeys(range(sequences), 1)
    return SimpleNamespace(
        num_scheduled_tokens=each, total_num_scheduled_tokens=sequences if tokens is None else tokens, seconds=seconds
    )


def test_a_steps_time_is_that_of_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(monkeypatch)
    worker = SimpleNamespace(model_runner=runner)
    begin_clock(worker, 2)
    slow, steady = [step(2, 1.0)] * SKIPPED, [step(2, 0.25)] * 10
    for scheduled in (step(2, 9.0, tokens=64), step(1, 9.0), *slow, *steady, *slow, step(1, 9.0)):
        assert worker.model_runner.execute_model(scheduled) == "done"
    assert end_clock(worker) == pytest.approx(250)
    assert worker.model_runner.execute_model == runner.execute_model


def test_a_run_that_is_too_short_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(model_runner=Runner(monkeypatch))
    begin_clock(worker, 1)
    worker.model_runner.execute_model(step(1, 1.0))
    with pytest.raises(RuntimeError, match="1 steps of one token a sequence"):
        end_clock(worker)
