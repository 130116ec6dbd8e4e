# SPDX-License-Identifier: Apache-2.0
"""One server's part of `speed.py`, which runs it: decode steps, their kernels, throughput, times to a first token.

Servers of one GPU measure in the order of `--beside`, each alone; first tokens are timed when all have done the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step_kernels import SKIPPED, TRACED, begin_clock, begin_trace, end_clock, end_trace
from turns import all_gpus, mark_file, turn, wait_for_marks

__all__ = ["NEW", "REQUESTS", "SEQUENCES"]

SEQUENCES = (1, 8, 32)
STEPS = 80
# Requests of which the first token is timed, and those whose tenant is read from a file.
FIRST, FROM_FILE = 6, 3
CACHE_GIB = 4.5
REQUESTS, PROMPT, NEW = 64, 128, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=["stock", "deltaweave", "lora256"])
    parser.add_argument("--folder", type=Path, required=True, help="with the base, a delta and a LoRA")
    parser.add_argument("--gpus", nargs="+", required=True, help="one for each tensor-parallel rank")
    parser.add_argument("--beside", nargs="+", required=True, help="the servers that share these GPUs, in turn")
    parser.add_argument("--output", type=Path, required=True, help="JSON of the figures")
    arguments = parser.parse_args()
    measure(arguments, arguments.server)


def engine(arguments: argparse.Namespace, server: str) -> Any:
    from vllm import LLM

    most = max(SEQUENCES)
    settings: dict[str, Any] = {}
    if server == "deltaweave":
        settings = {
            "quantization": "deltaweave",
            "enable_lora": True,
            "max_loras": most,
            "max_cpu_loras": most + 1,
            "additional_config": {"deltaweave": {"accept_base": True}},  # the base has no weights to compare
        }
    elif server == "lora256":
        settings = {"enable_lora": True, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": 256}
    return LLM(
        model=str(arguments.folder / "base"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=most,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=round(CACHE_GIB * (1 << 30)) // len(arguments.gpus),
        gpu_memory_utilization=0.05,
        tensor_parallel_size=len(arguments.gpus),
        enable_prefix_caching=False,
        compilation_config={
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, PROMPT],  # vLLM's own for 256 sequences go up to 512
            # FlashInfer's would be compiled at the first start, and uses multicast.
            "pass_config": {"fuse_allreduce_rms": False},
        },
        **settings,
    )


class Notes:
    """A server's figures, in its file as soon as they are there."""

    def __init__(self, file: Path, fixed: dict[str, Any]) -> None:
        self._file, self._fixed = file, fixed
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, **figures: Any) -> None:
        """More of one server; a figure that has parts gets more of them."""
        known = self.found.setdefault(name, dict(self._fixed))
        for key, value in figures.items():
            known[key] = known.get(key, {}) | value if isinstance(value, dict) else value
        self._file.write_text(json.dumps(self.found))


def measure(arguments: argparse.Namespace, server: str) -> None:
    """One server's figures."""
    folder, beside = arguments.folder, arguments.beside
    with turn(folder, fcntl.LOCK_SH, all_gpus(folder)):
        began = time.monotonic()
        llm = engine(arguments, server)
        notes = Notes(arguments.output, {"start_s": time.monotonic() - began})
        source = {"stock": None, "lora256": folder / "lora"}.get(server, folder / "delta.safetensors")
        adapters = loaded(llm, source, notes, server) if source else [None] * max(SEQUENCES)
    wait_for_marks(folder, beside[: beside.index(server)])
    try:
        with turn(folder, fcntl.LOCK_EX, arguments.gpus):
            serving(llm, adapters, notes, server, one_gpu=len(arguments.gpus) == 1)
    finally:
        mark_file(folder, server).touch()
    wait_for_marks(folder, beside)
    with turn(folder, fcntl.LOCK_EX, arguments.gpus):
        for place, milliseconds in first_tokens(llm, adapters, source, server):
            notes.add(server, first_token_ms={place: milliseconds})


def serving(llm: Any, adapters: list[Any], notes: Notes, server: str, *, one_gpu: bool) -> None:
    """Throughput, decode steps, what they are made of."""
    base: list[Any] = [None] * len(adapters)
    if server != "deltaweave":  # ours does so by itself; the others are measured at their best
        llm.collective_rpc(switch_contexts)
    notes.add(server, tokens_per_s=throughput(llm, adapters))
    steps(llm, adapters, notes, server)
    if server == "stock":
        notes.add(server, pair_step_ms=step_ms(llm, 2, base[:2]), copy_gb_s=copy_rate())
    if server == "deltaweave":
        for count in SEQUENCES:
            notes.add(server, base_step_ms={str(count): step_ms(llm, count, base[:count])})
    if one_gpu and server != "lora256":
        for count in SEQUENCES:
            notes.add(server, profile={str(count): traced(llm, adapters[:count])})
    if server == "deltaweave":
        if one_gpu:
            notes.add(server, profile={"base 1": traced(llm, base[:1])})
        llm.collective_rpc(beside_a_fusion)
        steps(llm, adapters, notes, "fusions")
        llm.collective_rpc(beside_no_fusion)


def loaded(llm: Any, source: Path, notes: Notes, name: str) -> list[Any]:
    """All tenants of one file, by their requests; notes how long each took."""
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(f"t{number}", number, str(source)) for number in range(1, max(SEQUENCES) + 1)]
    loads = []
    for adapter in adapters:
        start = time.monotonic()
        llm.llm_engine.add_lora(adapter)
        loads.append(1e3 * (time.monotonic() - start))
    notes.add(name, load_ms={"first": loads[0], "median": sorted(loads)[len(loads) // 2]})
    return adapters


def switch_contexts(worker: Any) -> None:
    """In the worker: gives back what changes of streams have cost by now."""
    import torch
    from deltaweave.runtime_plugin.pytorch.context_switch import context_switch

    if torch.cuda.is_available():
        context_switch(torch.cuda.current_device())()


def beside_a_fusion(worker: Any) -> None:
    """In the worker: steps of deltas run fusions' kernels from now on, as when one of the tenants is a fusion."""
    from deltaweave.runtime_plugin.vllm.step import Step

    worker.deltaweave_choose = choose = Step.choose

    def chosen(step: Step, *arguments: Any, **more: Any) -> None:
        choose(step, *arguments, **more)
        step.fused = step.active

    Step.choose = chosen  # type: ignore[method-assign]


def beside_no_fusion(worker: Any) -> None:
    """In the worker: as it was before."""
    from deltaweave.runtime_plugin.vllm.step import Step

    Step.choose = worker.deltaweave_choose  # type: ignore[method-assign]


def steps(llm: Any, adapters: list[Any], notes: Notes, name: str) -> None:
    for count in SEQUENCES:
        notes.add(name, step_ms={str(count): step_ms(llm, count, adapters[:count])})


def traced(llm: Any, adapters: list[Any]) -> dict[str, Any]:
    """What the time of a decode step of these sequences goes into on the device."""
    llm.collective_rpc(begin_trace, args=(len(adapters),))
    timed(llm, len(adapters), adapters, SKIPPED + TRACED + 4)
    found: dict[str, Any] = llm.collective_rpc(end_trace)[0]
    return found


def prompts(count: int, length: int = 32) -> list[Any]:
    return [{"prompt_token_ids": [(7 * row + place) % 31000 + 5 for place in range(length)]} for row in range(count)]


def timed(llm: Any, count: int, adapters: list[Any], tokens: int, length: int = 32) -> float:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.monotonic()
    llm.generate(prompts(count, length), settings, lora_request=adapters, use_tqdm=False)
    return time.monotonic() - start


def step_ms(llm: Any, count: int, adapters: list[Any]) -> float:
    """From one decode step's begin to the next one's, the mean of a run's; the best of three runs."""
    timed(llm, count, adapters, 4)
    return min(_run_step_ms(llm, count, adapters) for _ in range(3))


def _run_step_ms(llm: Any, count: int, adapters: list[Any]) -> float:
    llm.collective_rpc(begin_clock, args=(count,))
    timed(llm, count, adapters, STEPS)
    return float(llm.collective_rpc(end_clock)[0])


def throughput(llm: Any, adapters: list[Any]) -> float:
    """New tokens a second: 64 requests of 128 tokens and 128 new ones, over all tenants in turn."""
    whose = [adapters[row % len(adapters)] for row in range(REQUESTS)]
    timed(llm, REQUESTS, whose, 2, PROMPT)  # kernels are compiled where they are first needed
    return REQUESTS * NEW / timed(llm, REQUESTS, whose, NEW, PROMPT)


def first_tokens(llm: Any, adapters: list[Any], source: Path | None, server: str) -> Iterator[tuple[str, float]]:
    """Where a tenant is, and the median of milliseconds to the first token behind a prompt of 128 tokens.

    On the device, in host memory (ours alone can be moved there), in a file that the system has cached, in one that it
    has not.
    """
    from vllm.lora.request import LoRARequest

    few = adapters[:FIRST]
    first_token_ms(llm, [None])
    yield "base", first_token_ms(llm, [None] * FIRST)
    if source is None:
        return
    first_token_ms(llm, few)
    yield "resident", uploading(llm, few, 0, server)
    if server == "deltaweave":
        timed(llm, 1, [None], 1)  # a step keeps its tenants until the next begins
        llm.collective_rpc(evict, args=([str(adapter.lora_int_id) for adapter in few],))
        yield "host_memory", uploading(llm, few, len(few), server)
    cached = [LoRARequest(f"cached{number}", 100 + number, str(source)) for number in range(FROM_FILE)]
    yield "cached_file", uploading(llm, cached, FROM_FILE, server)
    copies = [uncached_copy(source, number) for number in range(FROM_FILE)]  # what is mapped somewhere stays cached
    if all(copies):
        unread = [LoRARequest(f"unread{number}", 200 + number, str(copy)) for number, copy in enumerate(copies)]
        yield "file", uploading(llm, unread, FROM_FILE, server)


def uploading(llm: Any, adapters: list[Any], expected: int, server: str) -> float:
    """Milliseconds to the first token, of tenants of which so many have to be brought to the device."""
    if server != "deltaweave":
        return first_token_ms(llm, adapters)
    before = llm.collective_rpc(uploads)[0]
    milliseconds = first_token_ms(llm, adapters)
    if (found := llm.collective_rpc(uploads)[0] - before) != expected:
        raise RuntimeError(f"{found} of {len(adapters)} tenants were brought to the device, expected {expected}")
    return milliseconds


def first_token_ms(llm: Any, adapters: list[Any]) -> float:
    """The median over tenants, of a prompt of 128 tokens."""
    times = sorted(timed(llm, 1, [adapter], 1, PROMPT) for adapter in adapters)
    return 1e3 * times[len(times) // 2]


def uncached_copy(source: Path, number: int) -> Path | None:
    """Another of the same file or folder, on the disk and not in the system's cache; None if it stays there."""
    folder = source.parent / f"unread{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = folder / source.name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    files = list(copy.iterdir()) if copy.is_dir() else [copy]
    return copy if all(forget(file) for file in files) else None


def forget(file: Path) -> bool:
    """Drops a file from the system's cache; whether that worked."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # what is not on the disk yet stays
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)
            told = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages) == 0
            del start  # the map cannot be closed before
    return told and sum(page & 1 for page in pages) <= 0.01 * len(pages)


def uploads(worker: Any) -> int:
    """In the worker: how many there were."""
    from deltaweave.runtime_plugin.vllm.step import Step

    return Step.current.arena.uploads


def evict(worker: Any, names: list[str]) -> None:
    """In the worker: leaves tenants in host memory alone."""
    from deltaweave.runtime_plugin.vllm.step import Step

    for name in names:
        Step.current.arena.evict(name)


def copy_rate() -> float:
    """GB/s from pinned memory."""
    import torch

    if not torch.cuda.is_available():
        return math.nan
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(8):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * (1 << 30) / (time.monotonic() - start) / 1e9


if __name__ == "__main__":
    main()
