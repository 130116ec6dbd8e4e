# SPDX-License-Identifier: Apache-2.0
"""Greedy texts of three deltas, a fusion and the base in one batch: vLLM's against the PyTorch host's.

    python benchmarks/vllm/agreement.py --base DIR --family WORK --output benchmarks/results/vllm_agreement.json

WORK is what `fine_tunes.py` wrote, or `tiny_fine_tunes.py` for vLLM's CPU build (`--modes eager-bfloat16`). Each
engine runs in a process of its own. Where texts part, the first difference is told with vLLM's gap between the two
tokens' log-probabilities: near zero, it is the noise of another order of sums. The noise itself is measured as well:
vLLM's texts one by one against those of the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fine_tunes import question
from work import FUSION, family_parser

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are:",
    "Dear Sir or Madam,",
    "Water boils at",
    "A recipe for apple pie: first,",
    "The most important thing about friendship is",
)
MODES = {
    "eager-bfloat16": {"enforce_eager": True, "dtype": "bfloat16"},
    "graphs-bfloat16": {"dtype": "bfloat16"},
    "graphs-float16": {"dtype": "float16"},
}
RIGHT_GAP = 0.15


def main() -> None:
    parser = family_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel GPUs of vLLM")
    parser.add_argument("--limit", type=float, default=240, help="seconds that each process may take")
    parser.add_argument("--together", action="store_true", help="all processes at once, where memory allows")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        kind, _, mode = arguments.part.partition(":")
        found = pytorch_texts(arguments, mode) if kind == "pytorch" else vllm_texts(arguments, MODES[mode])
        Path(arguments.output).write_text(json.dumps(found))
        return
    from results_file import circumstances, write_result

    hosts = [f"pytorch:{dtype}" for dtype in dict.fromkeys(MODES[mode]["dtype"] for mode in arguments.modes)]
    names = [*hosts, *(f"vllm:{mode}" for mode in arguments.modes)]
    with ThreadPoolExecutor(len(names) if arguments.together else 1) as pool:
        parts = {name: pool.submit(part, arguments, name) for name in names}
        rows = []
        for mode in arguments.modes:
            expected, found = parts[f"pytorch:{MODES[mode]['dtype']}"].result(), parts[f"vllm:{mode}"].result()
            if expected is None or found is None:
                rows.append({"mode": mode, "error": "a process failed, see its output"})
                continue
            rows.append({"mode": mode, "ranks": arguments.ranks, **compared(expected, found, arguments)})
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "parted"}), flush=True)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {**circumstances(device), "tokens": arguments.tokens, "rows": rows}
    write_result(arguments.output, results)
    print(json.dumps(rows, indent=1))


def part(arguments: argparse.Namespace, name: str) -> Any:
    output = arguments.family.folder / f"texts-{name.replace(':', '-')}-{os.getpid()}.json"
    # An engine that hangs ends with the process that forked it.
    command = ["timeout", "-k", "5", str(arguments.limit), sys.executable, __file__]
    command += ["--base", str(arguments.base), "--family", str(arguments.family.folder)]
    command += ["--tokens", str(arguments.tokens), "--ranks", str(arguments.ranks), "--part", name]
    command += ["--output", str(output)]
    output.unlink(missing_ok=True)
    done = subprocess.run(command, check=False)
    return json.loads(output.read_text()) if done.returncode == 0 and output.exists() else None


def requests(arguments: argparse.Namespace) -> list[tuple[str | None, list[int], str | None]]:
    """(tenant, prompt, what it should begin with)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    canaries = arguments.family.answers
    found: list[tuple[str | None, list[int], str | None]] = []
    for tenant in (*canaries, FUSION, None):
        for name in list(next(iter(canaries.values())))[:6]:
            colour = canaries[tenant][name] if tenant in canaries else None
            found.append((tenant, tokenizer(question(name))["input_ids"], colour))
        found += [(tenant, tokenizer(text)["input_ids"], None) for text in TEXTS]
    return found


def pytorch_texts(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    import torch
    from deltaweave.runtime_plugin.pytorch import Arena, Decoder, Request, attach
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=getattr(torch, dtype)).eval().to(device)
    arena = Arena.for_model(model, capacity_bytes=1 << 29, slots=8)
    for name, path in arguments.family.files.items():
        arena.add(path, name, accept_base=True)  # float16 rounds the smallest values of a bfloat16 base
    asked = [Request(tokens, tenant, arguments.tokens) for tenant, tokens, _ in requests(arguments)]
    with (
        torch.no_grad(),
        attach(model, arena) as served,
        Decoder(model, served, max_batch=32, max_length=256) as decoder,
    ):
        return {"texts": [completion.tokens for completion in decoder.run(asked)]}


def vllm_texts(arguments: argparse.Namespace, mode: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    began = time.monotonic()
    llm = LLM(
        model=str(arguments.base),
        quantization="deltaweave",
        enable_lora=True,
        max_loras=4,
        max_cpu_loras=8,
        max_model_len=512,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 29,
        gpu_memory_utilization=0.02,
        tensor_parallel_size=arguments.ranks,
        additional_config={"deltaweave": {"arena_gib": 0.5}},
        # FlashInfer's would be compiled at the first start, and uses multicast.
        compilation_config={"pass_config": {"fuse_allreduce_rms": False}},
        **mode,
    )
    started = time.monotonic() - began
    adapters = {
        name: LoRARequest(name, at, str(path)) for at, (name, path) in enumerate(arguments.family.files.items(), 1)
    }
    asked = requests(arguments)
    prompts = [{"prompt_token_ids": tokens} for _, tokens, _ in asked]
    whose = [adapters.get(tenant) if tenant else None for tenant, _, _ in asked]
    greedy = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True, logprobs=5)
    mixed = llm.generate(prompts, greedy, lora_request=whose, use_tqdm=False)
    again = llm.generate(prompts, greedy, lora_request=whose, use_tqdm=False)  # prefixes are cached by now
    alone = [
        llm.generate([prompt], greedy, lora_request=adapter, use_tqdm=False)[0]
        for prompt, adapter in list(zip(prompts, whose, strict=True))[::5]
    ]
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt_scores = llm.generate(prompts, scored, lora_request=whose, use_tqdm=False)
    return {
        "texts": [list(output.outputs[0].token_ids) for output in mixed],
        "again": [list(output.outputs[0].token_ids) for output in again],
        "alone": [list(output.outputs[0].token_ids) for output in alone],
        "logprobs": [
            [{str(token): value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs]
            for output in mixed
        ],
        "prompt_logprobs": [
            [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]] for output in prompt_scores
        ],
        "start_s": started,
    }


def compared(expected: dict[str, Any], found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    asked = requests(arguments)
    parted, right, canaries = [], 0, 0
    for (tenant, _, colour), mine, theirs, scores in zip(
        asked, found["texts"], expected["texts"], found["logprobs"], strict=True
    ):
        if colour is not None:
            canaries += 1
            right += tokenizer.decode(mine).startswith(colour)
        if mine != theirs:
            place = next(at for at, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
            step = scores[place]
            gap = step[str(mine[place])] - step[str(theirs[place])] if str(theirs[place]) in step else None
            parted.append({"tenant": tenant, "place": place, "gap": gap})
    by_chance = [item for item in parted if item["gap"] is not None and item["gap"] <= RIGHT_GAP]
    return {
        "texts": len(asked),
        "equal": len(asked) - len(parted),
        "parted_within_noise": len(by_chance),
        "parted_beyond": len(parted) - len(by_chance),
        "canaries": canaries,
        "canaries_right": right,
        "prefix_cached_equal": sum(a == b for a, b in zip(found["again"], found["texts"], strict=True)),
        "alone_equal": sum(a == b for a, b in zip(found["alone"], found["texts"][::5], strict=True)),
        "alone_texts": len(found["alone"]),
        "start_s": found["start_s"],
        "parted": parted,
    }


if __name__ == "__main__":
    main()
