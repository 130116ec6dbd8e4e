# SPDX-License-Identifier: Apache-2.0
"""Llama-2-7B's shapes in vLLM: decode steps and throughput of many tenants, against the stock server and its LoRAs.

    python benchmarks/vllm/speed.py --folder WORK --output results/vllm_speed.json --plot results

Weights are random (the dummy loader); deltas have the bands that `compress --ratio 1/16` chooses. Each server runs in a
process of its own: the stock one, ours, vLLM's LoRA at rank 256 on every projection. All start at the same time for
which there is room, each on the GPU that has most of it (`--ranks` GPUs); nobody measures before the others have
started and loaded their tenants, and servers of one GPU measure in the order in which they are named; times to a first
token come last of all, when nothing else is measured. Ours is measured with deltas, then with the kernels that a step
of deltas runs when one of the tenants is a fusion. A decode step is the mean of those in the middle of a run of 80 new
tokens, the best of three runs; prompts have 32 tokens of their own. Figures are written as they come, and kept if a
server's time is over.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from one_server import NEW, REQUESTS, SEQUENCES
from turns import mark_file, turn_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

# GiB that each server takes of its GPUs together with 32 layers, with room for graphs and contexts.
SERVERS = {"stock": 19, "deltaweave": 59, "lora256": 60}
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
    arguments = parser.parse_args()
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
        name = arguments.output.stem if arguments.output else "vllm_speed"
        plot(results, arguments.plot / f"{name}.png")


def served(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of the servers as they come; a server starts when there is room for it, those after it wait."""
    free = free_gib(arguments.ranks)
    for gpu in free:
        turn_file(arguments.folder, gpu).touch()
    for server in SERVERS:
        mark_file(arguments.folder, server).unlink(missing_ok=True)
    waiting = list(arguments.servers)
    running: dict[str, tuple[subprocess.Popen[bytes], list[str]]] = {}
    while waiting or running:
        batch: dict[str, list[str]] = {}
        while waiting and (gpus := with_room(free, waiting[0], arguments.ranks, alone=not (running or batch))):
            server = waiting.pop(0)
            batch[server] = gpus
            take(free, server, gpus)
        for server, gpus in batch.items():
            beside = [other for other, others in batch.items() if set(others) & set(gpus)]
            running[server] = (start(arguments, server, gpus, beside), gpus)
        time.sleep(0.5)
        for server, (process, gpus) in list(running.items()):
            if process.poll() is not None:
                mark_file(arguments.folder, server).touch()
                del running[server]
                take(free, server, gpus, sign=-1)
                yield finish(arguments, server, process.returncode)


def free_gib(ranks: int) -> dict[str, float]:
    """Memory of each GPU, by its name for CUDA_VISIBLE_DEVICES; without one, places for the ranks."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return {str(rank): 0.0 for rank in range(ranks)}
    if count < ranks:
        raise SystemExit(f"--ranks {ranks}: there are {count} GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {
        name: torch.cuda.get_device_properties(at).total_memory / (1 << 30)
        for at, name in enumerate(visible.split(","))
    }


def with_room(free: dict[str, float], server: str, ranks: int, *, alone: bool) -> list[str] | None:
    """The GPUs with most room, if it is enough; a server that is `alone` has to do with what there is."""
    most = sorted(free, key=free.__getitem__, reverse=True)[:ranks]
    enough = all(free[gpu] >= SERVERS[server] / ranks for gpu in most)
    return sorted(most) if enough or alone else None


def take(free: dict[str, float], server: str, gpus: list[str], *, sign: int = 1) -> None:
    for gpu in gpus:
        free[gpu] -= sign * SERVERS[server] / len(gpus)


def start(arguments: argparse.Namespace, server: str, gpus: list[str], beside: list[str]) -> subprocess.Popen[bytes]:
    output = arguments.folder / f"{server}.json"
    output.unlink(missing_ok=True)
    # An engine that hangs ends with the process that forked it.
    script = str(Path(__file__).with_name("one_server.py"))
    command = ["timeout", "-k", "5", str(arguments.limit), sys.executable, script, server]
    command += ["--folder", str(arguments.folder), "--output", str(output), "--gpus", *gpus, "--beside", *beside]
    settings = {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        # FlashInfer's sampler would be compiled at the first start, for two minutes; greedy sampling has no use for it.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Not every machine lets its GPUs use multicast.
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    }
    with (arguments.folder / f"{server}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **settings})


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


def write_base(arguments: argparse.Namespace) -> None:
    """config.json, a delta and a LoRA of random values; all tenants read the same file. Keeps what is there."""
    delta, lora = arguments.folder / "delta.safetensors", arguments.folder / "lora"
    if delta.exists() and (lora.exists() or "lora256" not in arguments.servers):
        return
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
    if not delta.exists():
        random_delta(delta, skeleton, bands=budget_bands, vocabulary="none", size=0.0)
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


def summarize(results: dict[str, Any]) -> None:
    """Ratios over the stock server's step, and what swapping merged models would give."""
    servers = results["servers"]
    stock = servers.get("stock", {})
    results["step_over_stock"] = {
        name: {
            count: value / stock["step_ms"][count]
            for count, value in found.get("step_ms", {}).items()
            if count in stock.get("step_ms", {})
        }
        for name, found in servers.items()
        if name != "stock"
    }
    if "copy_gb_s" not in stock:
        return
    each = REQUESTS // max(SEQUENCES)  # requests that wait for the same model are served together
    share = MERGED_BYTES / results["ranks"]
    seconds = share / (stock["copy_gb_s"] * 1e9) + NEW * 1e-3 * stock["pair_step_ms"]
    results["merged_swap"] = {
        "note": f"computed: 32 tenants in turn, {share / 1e9} GB over each GPU's bus at copy_gb_s, then {NEW} steps of "
        f"{each} sequences at the stock server's pair_step_ms; prompts are free",
        "tokens_per_s": each * NEW / seconds,
    }


def plot(results: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "stock": "vLLM, base alone",
        "deltaweave": "deltaweave",
        "fusions": "deltaweave, beside a fusion",
        "lora256": "vLLM's LoRA, rank 256",
    }
    complete = {
        name: found for name, found in results["servers"].items() if len(found.get("step_ms", {})) == len(SEQUENCES)
    }
    servers = {name: complete[name] for name in names if name in complete}
    if not servers:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, found in servers.items():
        left.plot(SEQUENCES, [found["step_ms"][str(count)] for count in SEQUENCES], marker="o", label=names[name])
    left.set(xscale="log", yscale="log", xlabel="sequences, each with a tenant of its own", ylabel="decode step, ms")
    left.set_xticks(SEQUENCES, map(str, SEQUENCES))
    low, high = left.get_ylim()
    left.set_yticks(
        marks := [mark for mark in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if low <= mark <= high], map(str, marks)
    )
    left.minorticks_off()
    left.legend(frameon=False)
    bars = {names[name]: found["tokens_per_s"] for name, found in servers.items() if "tokens_per_s" in found}
    if "merged_swap" in results:
        bars["merged models,\nswapped (computed)"] = results["merged_swap"]["tokens_per_s"]
    drawn = right.barh(list(bars), list(bars.values()), height=0.6)
    right.bar_label(drawn, fmt="%.0f", padding=3)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="new tokens a second, 64 requests, 32 tenants")
    gpus = f"{results['ranks']} x " if results["ranks"] > 1 else ""
    figure.suptitle(f"Llama-2-7B's shapes in vLLM 0.21, {gpus}{results['device']}")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
