# SPDX-License-Identifier: Apache-2.0
"""Llama-2-7B's shapes in vLLM: decode steps and throughput of many tenants, against the stock server and its LoRAs.

    python benchmarks/vllm/speed.py --folder WORK --output results/vllm_speed.json --plot results

Weights are random (the dummy loader); deltas have the bands that `compress --ratio 1/16` chooses. Each server runs in a
process of its own: the stock one, ours, vLLM's LoRA at rank 256 on every projection. Servers that fit on the card
together start together, and measure in turn. Ours is measured with fusions' kernels, as it starts, and then without
them: its CUDA graphs are captured again. A decode step is the difference of two runs, of 16 and 144 new tokens, over
128; prompts have 32 tokens of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

SEQUENCES = (1, 8, 32)
SHORT, LONG = 16, 144
COLD = 6
# GiB that each server takes of the device with 32 layers, with room for its graphs and context.
SERVERS = {"stock": 20, "deltaweave": 48, "lora256": 64}
CACHE_GIB = 4.5
REQUESTS, NEW = 64, 128
MERGED_BYTES = 13.48e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="less to try the script; figures are of 4096")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel GPUs")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a server may take in all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="folder of the plots")
    parser.add_argument("--only-files", action="store_true", help="write the base's configuration, a delta and a LoRA")
    parser.add_argument("--part", choices=SERVERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure(arguments, arguments.part)
        return
    import torch
    from results_file import circumstances, write_result

    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_base(arguments)
    if arguments.only_files:
        return
    device = circumstances("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {**device, "ranks": arguments.ranks, "layers": arguments.layers, "servers": {}}
    for found in served(arguments):
        results["servers"] |= found
        summarize(results)
        write_result(arguments.output, results)
    if arguments.plot:
        plot(results, arguments.plot)


def served(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of the servers as they come; a server starts when there is room for it, those after it wait."""
    import torch

    room = torch.cuda.mem_get_info()[1] / (1 << 30) * arguments.ranks if torch.cuda.is_available() else 0
    waiting = list(arguments.servers)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and (not running or sum(SERVERS[name] for name in (*running, waiting[0])) <= room):
            running[waiting[0]] = start(arguments, waiting[0])
            waiting.pop(0)
        time.sleep(0.5)
        for server, process in list(running.items()):
            if process.poll() is not None:
                del running[server]
                yield finish(arguments, server, process.returncode)


def start(arguments: argparse.Namespace, server: str) -> subprocess.Popen[bytes]:
    output = arguments.folder / f"{server}.json"
    output.unlink(missing_ok=True)
    command = ["timeout", "-k", "5", str(arguments.limit), sys.executable, __file__, "--folder", str(arguments.folder)]
    command += ["--ranks", str(arguments.ranks), "--layers", str(arguments.layers), "--hidden", str(arguments.hidden)]
    command += ["--part", server, "--output", str(output)]
    # FlashInfer's sampler would be compiled at the first start, for two minutes; greedy sampling has no use for it.
    settings = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with (arguments.folder / f"{server}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**settings, **os.environ})


def finish(arguments: argparse.Namespace, server: str, status: int) -> dict[str, Any]:
    """What a server measured, though it may not have come to its end."""
    output, log = arguments.folder / f"{server}.json", (arguments.folder / f"{server}.log").read_text()
    if status:
        print(server, f"ended with {status}:\n", log[-3000:], flush=True)
    found = json.loads(output.read_text()) if output.exists() else {}
    if taken := re.search(r"Graph capturing finished in .* took (\S+) GiB", log):
        found["graphs_gib"] = float(taken[1])  # of the whole device: what others took meanwhile is in it
    if status:
        found["ended_with"] = status
    print(server, json.dumps(found), flush=True)
    names = ("deltaweave", "fusions") if server == "deltaweave" else (server,)
    return {name: found[name] | {"graphs_gib": found.get("graphs_gib")} for name in names if name in found}


@contextmanager
def turn(folder: Path, mode: int) -> Iterator[None]:
    """Nobody measures meanwhile; with `LOCK_EX` nobody else starts or loads either, which they do with `LOCK_SH`.

    The engine that vLLM forks inside shares the open file, so that closing it here would leave the lock to the engine.
    """
    with (folder / "measuring").open("a") as file:
        fcntl.flock(file, mode)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def write_base(arguments: argparse.Namespace) -> None:
    """config.json, a delta and a LoRA of random values; all tenants read the same file."""
    import torch
    from random_delta import budget_bands, random_delta
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 43 // 16,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=arguments.hidden // 128,
        vocab_size=32000,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    config.save_pretrained(arguments.folder / "base")
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    for module in skeleton.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight = torch.nn.Parameter(torch.ones(config.hidden_size))
    delta = arguments.folder / "delta.safetensors"
    if not delta.exists():
        random_delta(delta, skeleton, bands=budget_bands, vocabulary="none", size=0.0)
    lora = arguments.folder / "lora"
    if "lora256" in arguments.servers and not lora.exists():
        lora.mkdir()
        tensors = {}
        for name, weight in skeleton.named_parameters():
            if name.endswith("_proj.weight"):
                stem = "base_model.model." + name.removesuffix(".weight")
                tensors[f"{stem}.lora_A.weight"] = torch.full((256, weight.shape[1]), 1e-4, dtype=torch.bfloat16)
                tensors[f"{stem}.lora_B.weight"] = torch.full((weight.shape[0], 256), 1e-4, dtype=torch.bfloat16)
        save_file(tensors, lora / "adapter_model.safetensors")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = {"peft_type": "LORA", "r": 256, "lora_alpha": 256, "target_modules": targets, "bias": "none"}
        (lora / "adapter_config.json").write_text(json.dumps(settings))


def engine(arguments: argparse.Namespace, server: str) -> Any:
    from vllm import LLM

    most = max(SEQUENCES)
    settings: dict[str, Any] = {}
    if server == "deltaweave":
        size = 1.03 * (arguments.folder / "delta.safetensors").stat().st_size + (1 << 20)  # as the arena pads it
        own = {"arena_gib": most * size / (1 << 30) / arguments.ranks, "accept_base": True}
        settings = {
            "quantization": "deltaweave",
            "enable_lora": True,
            "max_loras": most,
            "max_cpu_loras": most + 1,
            "additional_config": {"deltaweave": own},
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
        kv_cache_memory_bytes=round(CACHE_GIB * (1 << 30)) // arguments.ranks,
        gpu_memory_utilization=0.05,
        tensor_parallel_size=arguments.ranks,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        **settings,
    )


def measure(arguments: argparse.Namespace, server: str) -> None:
    """One server's figures, written as they come."""
    with turn(arguments.folder, fcntl.LOCK_SH):
        began = time.monotonic()
        llm = engine(arguments, server)
        start = {"start_s": time.monotonic() - began}
    source = arguments.folder / ("lora" if server == "lora256" else "delta.safetensors")
    found: dict[str, Any] = {}

    def write(name: str, values: dict[str, Any]) -> None:
        found[name] = values
        arguments.output.write_text(json.dumps(found))

    if server == "stock":
        with turn(arguments.folder, fcntl.LOCK_EX):
            write(server, start | speeds(llm, [None] * max(SEQUENCES)))
            write(server, found[server] | {"pair_step_ms": step_ms(llm, 2, [None] * 2), "copy_gb_s": copy_rate()})
        return
    with turn(arguments.folder, fcntl.LOCK_SH):
        adapters, loads = loaded(llm, source)
    first = "fusions" if server == "deltaweave" else server
    with turn(arguments.folder, fcntl.LOCK_EX):
        write(first, start | loads | speeds(llm, adapters))
        write(first, found[first] | {"base_step_ms": steps(llm, [None] * max(SEQUENCES), (1, 32))})
        if server == "deltaweave":
            write(
                first, found[first] | {"first_token_ms": found[first]["first_token_ms"] | cold(llm, adapters, source)}
            )
            llm.collective_rpc(without_fusions)
            write(server, start | loads | speeds(llm, adapters))


def loaded(llm: Any, source: Path) -> tuple[list[Any], dict[str, Any]]:
    """All tenants of one file, by their requests, and how long each took."""
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(f"t{number}", number, str(source)) for number in range(1, max(SEQUENCES) + 1)]
    loads = []
    for adapter in adapters:
        start = time.monotonic()
        llm.llm_engine.add_lora(adapter)
        loads.append(1e3 * (time.monotonic() - start))
    return adapters, {"load_ms": {"first": loads[0], "median": sorted(loads)[len(loads) // 2]}}


def without_fusions(worker: Any) -> None:
    """In the worker: serves deltas alone from now on, as a server that was started with fusions off."""
    from deltaweave.runtime_plugin.vllm.step import Step
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    Step.current.fusions, Step.current.places = False, range(0)
    if not Step.current.arena.buffer.is_cuda:
        return
    CUDAGraphWrapper.clear_all_graphs()
    worker.model_runner.capture_model()


def speeds(llm: Any, adapters: list[Any]) -> dict[str, Any]:
    return {
        "step_ms": steps(llm, adapters, SEQUENCES),
        "tokens_per_s": throughput(llm, adapters),
        "first_token_ms": {"base": first_token_ms(llm, [None] * 3)},
    }


def steps(llm: Any, adapters: list[Any], counts: Sequence[int]) -> dict[str, float]:
    return {str(count): step_ms(llm, count, adapters[:count]) for count in counts}


def prompts(count: int, length: int = 32) -> list[Any]:
    return [{"prompt_token_ids": [(7 * row + place) % 31000 + 5 for place in range(length)]} for row in range(count)]


def timed(llm: Any, count: int, adapters: list[Any], tokens: int, length: int = 32) -> float:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.monotonic()
    llm.generate(prompts(count, length), settings, lora_request=adapters, use_tqdm=False)
    return time.monotonic() - start


def step_ms(llm: Any, count: int, adapters: list[Any]) -> float:
    """The best of two."""
    timed(llm, count, adapters, 4)
    return 1e3 * min(
        (timed(llm, count, adapters, LONG) - timed(llm, count, adapters, SHORT)) / (LONG - SHORT) for _ in range(2)
    )


def throughput(llm: Any, adapters: list[Any]) -> float:
    """New tokens a second: 64 requests of 128 tokens and 128 new ones, over all tenants in turn."""
    whose = [adapters[row % len(adapters)] for row in range(REQUESTS)]
    return REQUESTS * NEW / timed(llm, REQUESTS, whose, NEW, 128)


def first_token_ms(llm: Any, adapters: list[Any]) -> float:
    """The median over tenants, of a prompt of 128 tokens."""
    times = sorted(timed(llm, 1, [adapter], 1, 128) for adapter in adapters)
    return 1e3 * times[len(times) // 2]


def cold(llm: Any, adapters: list[Any], source: Path) -> dict[str, float]:
    """To the first token of a tenant on the device, in host memory, and in a file that the system has cached."""
    from vllm.lora.request import LoRARequest

    first_token_ms(llm, adapters[:COLD])
    found = {"resident": first_token_ms(llm, adapters[:COLD])}
    fresh = [LoRARequest(f"cold{number}", 100 + number, str(source)) for number in range(COLD)]
    found["file"] = first_token_ms(llm, fresh)
    # Now the 33 last used are in host memory and 32 of them on the device; asked for in order of age, each comes back.
    held = [*adapters[COLD + 1 :], *adapters[:COLD], *fresh][-33:]
    found["host_memory"] = first_token_ms(llm, held[:COLD])
    return found


def summarize(results: dict[str, Any]) -> None:
    """Ratios over the stock server's step, and what swapping merged models would give."""
    servers = results["servers"]
    stock = servers.get("stock")
    if stock is None or "copy_gb_s" not in stock:
        return
    results["step_over_stock"] = {
        name: {count: value / stock["step_ms"][count] for count, value in found["step_ms"].items()}
        for name, found in servers.items()
        if name != "stock" and "step_ms" in found
    }
    each = REQUESTS // max(SEQUENCES)  # requests that wait for the same model are served together
    seconds = MERGED_BYTES / (stock["copy_gb_s"] * 1e9) + NEW * 1e-3 * stock["pair_step_ms"]
    results["merged_swap"] = {
        "note": f"computed: 32 tenants in turn, {MERGED_BYTES / 1e9} GB over the bus at copy_gb_s, then {NEW} steps of "
        f"{each} sequences at the stock server's pair_step_ms; prompts are free",
        "tokens_per_s": each * NEW / seconds,
    }


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


def plot(results: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "stock": "vLLM, base alone",
        "deltaweave": "deltaweave, a tenant a sequence",
        "fusions": "the same, fusions on",
        "lora256": "vLLM's LoRA, rank 256",
    }
    servers = {name: results["servers"][name] for name in names if name in results["servers"]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, found in servers.items():
        left.plot(SEQUENCES, [found["step_ms"][str(count)] for count in SEQUENCES], marker="o", label=names[name])
    left.set(xscale="log", yscale="log", xlabel="sequences, each with a tenant of its own", ylabel="decode step, ms")
    left.set_xticks(SEQUENCES, map(str, SEQUENCES))
    left.legend(frameon=False)
    bars = {names[name]: found["tokens_per_s"] for name, found in servers.items()}
    if "merged_swap" in results:
        bars["merged models, swapped (computed)"] = results["merged_swap"]["tokens_per_s"]
    right.barh(list(bars), list(bars.values()))
    right.invert_yaxis()
    right.set(xscale="log", xlabel="new tokens a second, 64 requests over 32 tenants")
    figure.suptitle(f"Llama-2-7B's shapes in vLLM 0.21, {results['device']}")
    figure.savefig(folder / "vllm_speed.png", dpi=120)


if __name__ == "__main__":
    main()
