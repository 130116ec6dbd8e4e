# SPDX-License-Identifier: Apache-2.0
"""Llama-2-7B's shapes in vLLM: decode steps and throughput of many tenants, against the stock server and its LoRAs.

    python benchmarks/vllm/speed.py --folder WORK --output results/vllm_speed.json --plot results

Weights are random (the dummy loader); deltas have the bands that `compress --ratio 1/16` chooses. Each server runs in a
process of its own: the stock one, ours without and with fusions' kernels, vLLM's LoRA at rank 256 on every projection.
A decode step is the difference of two runs, of 16 and 144 new tokens, over 128; prompts have 32 tokens of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

SEQUENCES = (1, 8, 32)
SHORT, LONG = 16, 144
SERVERS = ("stock", "deltaweave", "fusions", "lora256")
COLD = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel GPUs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="folder of the plots")
    parser.add_argument("--together", action="store_true", help="start all servers at once; they measure in turn")
    parser.add_argument("--part", choices=SERVERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        arguments.output.write_text(json.dumps(measure(arguments, arguments.part)))
        return
    from results_file import circumstances, write_result

    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_base(arguments)
    results: dict[str, Any] = {**circumstances(), "ranks": arguments.ranks, "servers": {}}
    for names in [arguments.servers] if arguments.together else [[server] for server in arguments.servers]:
        running = [(server, start(arguments, server)) for server in names]
        for server, process in running:
            results["servers"] |= finish(arguments, server, process)
            summarize(results)
            write_result(arguments.output, results)
    if arguments.plot:
        plot(results, arguments.plot)


def start(arguments: argparse.Namespace, server: str) -> subprocess.Popen[bytes]:
    output = arguments.folder / f"{server}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--folder", str(arguments.folder), "--ranks", str(arguments.ranks)]
    command += ["--layers", str(arguments.layers), "--part", server, "--output", str(output)]
    with (arguments.folder / f"{server}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(arguments: argparse.Namespace, server: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    try:
        status = process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    output = arguments.folder / f"{server}.json"
    if status or not output.exists():
        print(server, "failed:\n", (arguments.folder / f"{server}.log").read_text()[-3000:], flush=True)
        return {}
    found = json.loads(output.read_text())
    print(server, json.dumps(found), flush=True)
    return {server: found}


@contextmanager
def alone(arguments: argparse.Namespace) -> Iterator[None]:
    """Nobody else measures meanwhile."""
    with (arguments.folder / "measuring").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_base(arguments: argparse.Namespace) -> None:
    """config.json, a delta and a LoRA of random values; all tenants read the same file."""
    import torch
    from random_delta import budget_bands, random_delta
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        num_key_value_heads=32,
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
    if server in ("deltaweave", "fusions"):
        own = {"arena_gib": 30.5 / arguments.ranks, "accept_base": True, "fusions": server == "fusions"}
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
        kv_cache_memory_bytes=(5 << 30) // arguments.ranks,
        gpu_memory_utilization=0.05,
        tensor_parallel_size=arguments.ranks,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        **settings,
    )


def measure(arguments: argparse.Namespace, server: str) -> dict[str, Any]:
    began = time.monotonic()
    llm = engine(arguments, server)
    found: dict[str, Any] = {"start_s": time.monotonic() - began}
    with alone(arguments):
        return found | measured(arguments, server, llm)


def measured(arguments: argparse.Namespace, server: str, llm: Any) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    found: dict[str, Any] = {}
    source = arguments.folder / ("lora" if server == "lora256" else "delta.safetensors")
    adapters: list[Any] = [None] * max(SEQUENCES)
    if server != "stock":
        adapters = [LoRARequest(f"t{number}", number, str(source)) for number in range(1, max(SEQUENCES) + 1)]
        loads = []
        for adapter in adapters:
            start = time.monotonic()
            llm.llm_engine.add_lora(adapter)
            loads.append(time.monotonic() - start)
        found["load_ms"] = {"first": 1e3 * loads[0], "median": 1e3 * sorted(loads)[len(loads) // 2]}
    found["step_ms"] = {str(count): step_ms(llm, count, adapters[:count]) for count in SEQUENCES}
    if server != "stock":
        found["base_step_ms"] = {str(count): step_ms(llm, count, [None] * count) for count in (1, 32)}
    found["tokens_per_s"] = throughput(llm, adapters)
    found["first_token_ms"] = {"base": first_token_ms(llm, [None] * 3)}
    if server in ("deltaweave", "fusions"):
        found["first_token_ms"] |= cold(llm, adapters, source)
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
    """The best of two."""
    timed(llm, count, adapters, 4)
    return 1e3 * min(
        (timed(llm, count, adapters, LONG) - timed(llm, count, adapters, SHORT)) / (LONG - SHORT) for _ in range(2)
    )


def throughput(llm: Any, adapters: list[Any]) -> float:
    """New tokens a second: 64 requests of 128 tokens and 128 new ones, over all tenants in turn."""
    whose = [adapters[row % len(adapters)] for row in range(64)]
    return 64 * 128 / timed(llm, 64, whose, 128, 128)


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
    if stock is None:
        return
    results["step_over_stock"] = {
        name: {count: value / stock["step_ms"][count] for count, value in found["step_ms"].items()}
        for name, found in servers.items()
        if name != "stock"
    }
    rate = results.setdefault("copy_gb_s", copy_rate())
    swap = 13.5e9 / (rate * 1e9)
    each = swap + 128e-3 * stock["step_ms"]["1"]
    results["merged_swap"] = {
        "note": "computed: tenants in turn, 13.5 GB over the bus at copy_gb_s, then 128 steps of one sequence",
        "tokens_per_s": 128 / each,
    }


def copy_rate() -> float:
    """GB/s from pinned memory."""
    import torch

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
