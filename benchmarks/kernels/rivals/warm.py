# SPDX-License-Identifier: Apache-2.0
"""Kernels that are compiled at run time, compiled by worker processes before anything is timed.

The compilers' caches on disk are what the measuring process finds. A worker also shows which contender fails, or takes
the process with it, before the measuring process tries.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .cases import Case
from .contenders import Entry
from .measure import device_works, refusal
from .workload import Workload

__all__ = ["compile_in_workers", "failed", "warm_entries", "work"]


def warm_entries(entries: Sequence[Entry]) -> list[Entry]:
    """The cheaper cases that compile what `entries` need, each once."""
    wanted: dict[str, Entry] = {}
    for kind, case in entries:
        if kind.compiles:
            small = kind.warm_case(case)
            wanted.setdefault(_key(kind, small), (kind, small))
    return sorted(wanted.values(), key=lambda entry: entry[0].name)


def work(entries: Sequence[Entry], output: Path) -> None:
    """A worker's part: one launch and one check of each entry; a JSON line each, written at once."""
    with output.open("w") as file:
        for kind, case in entries:
            begin = time.monotonic()
            try:
                with torch.inference_mode():
                    error: float | None = kind(case, 1).error(0)
                    torch.cuda.synchronize()
                reason = None
            except Exception as failure:
                error, reason = None, refusal(failure)
            line = {"key": _key(kind, case), "error": error, "reason": reason, "seconds": time.monotonic() - begin}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if reason and not device_works():
                return  # what is left would fail for this entry's sake
            torch.cuda.empty_cache()


def compile_in_workers(
    entries: Sequence[Entry], workers: int, seconds: float, command: Sequence[str]
) -> dict[str, str]:
    """Runs `command --worker I/N FILE` N times; workers are stopped after `seconds`.

    Returns:
        Reasons of failure by entry, for `failed`.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.ExitStack() as logs:
            processes = []
            for i in range(workers):
                log = logs.enter_context((folder / f"{i}.log").open("w"))
                part = [sys.executable, *command, "--worker", f"{i}/{workers}", str(folder / f"{i}.jsonl")]
                processes.append(subprocess.Popen(part, stdout=log, stderr=subprocess.STDOUT))
            for i, process in enumerate(processes):
                try:
                    process.wait(max(0.0, begin + seconds - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                if process.returncode:
                    last = (folder / f"{i}.log").read_text().strip().splitlines()[-1:] or ["no output"]
                    print(f"worker {i} ended with {process.returncode}: {last[0]}", flush=True)
        seen = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    wanted, took = len(warm_entries(entries)), time.monotonic() - begin
    slowest = max((line["seconds"] for line in seen), default=0.0)
    print(
        f"compiled the kernels of {len(seen)} of {wanted} cases in {took:.0f} s, the slowest {slowest:.0f} s",
        flush=True,
    )
    return {line["key"]: line["reason"] for line in seen if line["reason"]}


def failed(entry: Entry, reasons: dict[str, str]) -> str | None:
    """Why a worker could not run this entry's kernels, or None."""
    kind, case = entry
    return reasons.get(_key(kind, kind.warm_case(case))) if kind.compiles else None


def _key(kind: type[Workload], case: Case) -> str:
    return f"{kind.name} {kind.warm_key(case)}"
