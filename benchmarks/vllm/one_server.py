# SPDX-License-Identifier: Apache-2.0
"""One server's part of `speed.py`, which runs it: decode steps, their kernels, throughput, times to a first token."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step_kernels import SKIPPED, TRACED, begin_trace, end_trace
from turns import all_gpus, turn

__all__ = ["NEW", "REQUESTS", "SEQUENCES"]

SEQUENCES = (1, 8, 32)
SHORT, LONG = 16, 80
COLD = 6
CACHE_GIB = 4.5
REQUESTS, PROMPT, NEW = 64, 128, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=["stock", "deltaweave", "lora256"])
    parser.add_argument("--folder", type=Path, required=True, help="with the base, a delta and a LoRA")
    parser.add_argument("--gpus", nargs="+", required=True, help="one for each tensor-parallel rank")
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
    with turn(arguments.folder, fcntl.LOCK_SH, all_gpus(arguments.folder)):
        began = time.monotonic()
        llm = engine(arguments, server)
        notes = Notes(arguments.output, {"start_s": time.monotonic() - began})
    base: list[Any] = [None] * max(SEQUENCES)
    one_gpu = len(arguments.gpus) == 1
    if server == "stock":
        with turn(arguments.folder, fcntl.LOCK_EX, arguments.gpus):
            answers(llm, base, notes, server)
            steps(llm, base, notes, server)
            notes.add(server, pair_step_ms=step_ms(llm, 2, base[:2]), copy_gb_s=copy_rate())
            if one_gpu:
                trace(llm, base, notes, server)
        return
    source = arguments.folder / ("lora" if server == "lora256" else "delta.safetensors")
    with turn(arguments.folder, fcntl.LOCK_SH, arguments.gpus):
        adapters = loaded(llm, source, notes, server)
    with turn(arguments.folder, fcntl.LOCK_EX, arguments.gpus):
        answers(llm, adapters, notes, server)
        steps(llm, adapters, notes, server)
        for count in (1, max(SEQUENCES)):
            notes.add(server, base_step_ms={str(count): step_ms(llm, count, base[:count])})
        if one_gpu:
            trace(llm, adapters, notes, server)
        if server != "deltaweave":
            return
        for place, milliseconds in cold(llm, adapters, source):
            notes.add(server, first_token_ms={place: milliseconds})
        llm.collective_rpc(beside_a_fusion)
        steps(llm, adapters, notes, "fusions")
        if one_gpu:
            trace(llm, adapters, notes, "fusions")


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


def beside_a_fusion(worker: Any) -> None:
    """In the worker: steps of deltas run fusions' kernels from now on, as when one of the tenants is a fusion."""
    from deltaweave.runtime_plugin.vllm.step import Step

    choose = Step.choose

    def chosen(step: Step, *arguments: Any, **more: Any) -> None:
        choose(step, *arguments, **more)
        step.fused = step.active

    Step.choose = chosen  # type: ignore[method-assign]


def steps(llm: Any, adapters: list[Any], notes: Notes, name: str) -> None:
    for count in SEQUENCES:
        notes.add(name, step_ms={str(count): step_ms(llm, count, adapters[:count])})


def answers(llm: Any, adapters: list[Any], notes: Notes, name: str) -> None:
    notes.add(name, tokens_per_s=throughput(llm, adapters))
    notes.add(name, first_token_ms={"base": first_token_ms(llm, [None] * 3)})


def trace(llm: Any, adapters: list[Any], notes: Notes, name: str) -> None:
    """What a decode step's time on the device goes into."""
    for count in (1, max(SEQUENCES)):
        llm.collective_rpc(begin_trace, args=(count,))
        timed(llm, count, adapters[:count], SKIPPED + TRACED + 4)
        notes.add(name, profile={str(count): llm.collective_rpc(end_trace)[0]})


def prompts(count: int, length: int = 32) -> list[Any]:
    return [{"prompt_token_ids": [(7 * row + place) % 31000 + 5 for place in range(length)]} for row in range(count)]


def timed(llm: Any, count: int, adapters: list[Any], tokens: int, length: int = 32) -> float:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.monotonic()
    llm.generate(prompts(count, length), settings, lora_request=adapters, use_tqdm=False)
    return time.monotonic() - start


def step_ms(llm: Any, count: int, adapters: list[Any]) -> float:
    """Of the best long run and the best short one; the best difference would be that with the worst short run."""
    timed(llm, count, adapters, 4)
    short, long = (min(timed(llm, count, adapters, tokens) for _ in range(3)) for tokens in (SHORT, LONG))
    return 1e3 * (long - short) / (LONG - SHORT)


def throughput(llm: Any, adapters: list[Any]) -> float:
    """New tokens a second: 64 requests of 128 tokens and 128 new ones, over all tenants in turn."""
    whose = [adapters[row % len(adapters)] for row in range(REQUESTS)]
    timed(llm, REQUESTS, whose, 2, PROMPT)  # kernels are compiled where they are first needed
    return REQUESTS * NEW / timed(llm, REQUESTS, whose, NEW, PROMPT)


def first_token_ms(llm: Any, adapters: list[Any]) -> float:
    """The median over tenants, of a prompt of 128 tokens."""
    times = sorted(timed(llm, 1, [adapter], 1, PROMPT) for adapter in adapters)
    return 1e3 * times[len(times) // 2]


def cold(llm: Any, adapters: list[Any], source: Path) -> Iterator[tuple[str, float]]:
    """To the first token of a tenant on the device, in host memory, and in a file that the system has cached."""
    from vllm.lora.request import LoRARequest

    first_token_ms(llm, adapters[:COLD])
    yield "resident", uploading(llm, adapters[:COLD], 0)
    timed(llm, 1, [None], 1)  # a step keeps its tenants until the next begins
    llm.collective_rpc(evict, args=([str(adapter.lora_int_id) for adapter in adapters[:COLD]],))
    yield "host_memory", uploading(llm, adapters[:COLD], COLD)
    fresh = [LoRARequest(f"cold{number}", 100 + number, str(source)) for number in range(COLD)]
    yield "file", uploading(llm, fresh, COLD)


def uploading(llm: Any, adapters: list[Any], expected: int) -> float:
    """Milliseconds to the first token, of tenants of which so many have to be brought to the device."""
    before = llm.collective_rpc(uploads)[0]
    milliseconds = first_token_ms(llm, adapters)
    if (found := llm.collective_rpc(uploads)[0] - before) != expected:
        raise RuntimeError(f"{found} of {len(adapters)} tenants were brought to the device, expected {expected}")
    return milliseconds


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
