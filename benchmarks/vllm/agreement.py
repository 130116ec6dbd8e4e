# SPDX-License-Identifier: Apache-2.0
"""Greedy texts of three deltas, a fusion and the base in one batch: vLLM's against the PyTorch host's.

    python benchmarks/vllm/agreement.py --base DIR --family WORK --output benchmarks/results/vllm_agreement.json

WORK is what `fine_tunes.py` wrote, or `tiny_fine_tunes.py` for vLLM's CPU build (`--modes eager-bfloat16`). Each
engine runs in a process of its own. Texts are asked for in groups of `--sequences`, each of all tenants, in both hosts:
kernels differ between steps of few tokens and of many. Where texts part, the first difference is told with vLLM's gap
between the two tokens' log-probabilities: near zero, it is the noise of another order of sums. The noise itself is
measured as well: vLLM's texts with cached prefixes, and one by one, against those of the group. How far a format's
rounding goes is told by the reference op on a CPU, in float32: by the root mean square of what the prompts' tokens'
log-probabilities are from its own, and by how far each token of the hosts' texts is from the one that it would choose.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
REFERENCE = "float32"
RIGHT_GAP = 0.15
# Every fourth text is asked for alone too: of all tenants in turn, of whom there are five.
ALONE = 4


def main() -> None:
    parser = family_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel GPUs of vLLM")
    parser.add_argument("--sequences", type=int, nargs="+", default=[70, 8], help="texts at a time, once for each")
    parser.add_argument("--limit", type=float, default=240, help="seconds that each process may take")
    parser.add_argument("--together", action="store_true", help="all processes at once, where memory allows")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        kind, _, mode = arguments.part.partition(":")
        if kind == "pytorch":
            found = reference_scores(arguments) if mode == REFERENCE else pytorch_texts(arguments, mode)
        else:
            found = vllm_texts(arguments, MODES[mode])
        Path(arguments.output).write_text(json.dumps(found))
        return
    from results_file import circumstances, write_result

    hosts = [f"pytorch:{dtype}" for dtype in dict.fromkeys(MODES[mode]["dtype"] for mode in arguments.modes)]
    names = [f"pytorch:{REFERENCE}", *hosts, *(f"vllm:{mode}" for mode in arguments.modes)]
    with ThreadPoolExecutor(len(names) if arguments.together else 1) as pool:
        parts = {name: pool.submit(part, arguments, name) for name in names}
        rows = []
        for mode in arguments.modes:
            expected, found = parts[f"pytorch:{MODES[mode]['dtype']}"].result(), parts[f"vllm:{mode}"].result()
            if expected is None or found is None:
                rows.append({"mode": mode, "error": "a process failed, see its output"})
                continue
            row: dict[str, Any] = {"mode": mode, "ranks": arguments.ranks, "start_s": found["start_s"]}
            if (exact := parts[f"pytorch:{REFERENCE}"].result()) is not None:
                row["prompt_error"] = prompt_errors(exact["prompt_logprobs"], found["prompt_logprobs"], arguments)
            for count in arguments.sequences:
                one = compared(expected[str(count)], found[str(count)], found["alone"], arguments)
                rows.append({**row, "sequences": count, **one})
                texts = {"vllm": found[str(count)]["texts"], "pytorch": expected[str(count)]}
                rows[-1]["shortfall"] = shortfalls(texts, arguments)
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
    command += ["--sequences", *map(str, arguments.sequences)]
    command += ["--output", str(output)]
    output.unlink(missing_ok=True)
    done = subprocess.run(command, check=False)
    return json.loads(output.read_text()) if done.returncode == 0 and output.exists() else None


def requests(arguments: argparse.Namespace) -> list[tuple[str | None, list[int], str | None]]:
    """(tenant, prompt, what it should begin with), of all tenants in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    canaries = arguments.family.answers
    prompts = [(question(name), name) for name in list(next(iter(canaries.values())))[:6]]
    return [
        (tenant, tokenizer(prompt)["input_ids"], canaries[tenant][name] if name and tenant in canaries else None)
        for prompt, name in (*prompts, *((text, None) for text in TEXTS))
        for tenant in (*canaries, FUSION, None)
    ]


def groups(items: list[Any], count: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), count):
        yield items[start : start + count]


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
    texts = {}
    with torch.no_grad(), attach(model, arena) as served:
        for count in arguments.sequences:
            with Decoder(model, served, max_batch=min(count, 32), max_length=256) as decoder:
                texts[str(count)] = [completion.tokens for completion in decoder.run(asked)]
    return texts


def references(arguments: argparse.Namespace) -> Iterator[tuple[str | None, list[int], Any]]:
    """Each tenant, the places of its requests, and the model as it is for it alone, in float32 on a CPU."""
    import torch
    from deltaweave.formats import open_tenant
    from deltaweave.runtime_plugin.pytorch import attach
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).eval()
    asked = [tenant for tenant, _, _ in requests(arguments)]
    for tenant in dict.fromkeys(asked):
        with ExitStack() as stack:
            if tenant is not None:
                opened = stack.enter_context(open_tenant(arguments.family.file(tenant)))
                stack.enter_context(attach(model, opened, accept_base=True))
            stack.enter_context(torch.no_grad())
            yield tenant, [place for place, whose in enumerate(asked) if whose == tenant], model


def reference_scores(arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities of the prompts' tokens."""
    import torch
    from torch import nn

    asked, found = requests(arguments), {}
    for _, places, model in references(arguments):
        own = [torch.tensor(asked[place][1]) for place in places]
        padded = nn.utils.rnn.pad_sequence(own, batch_first=True)  # behind all that is looked at
        scores = model(padded).logits.log_softmax(-1)
        for row, place, tokens in zip(scores, places, own, strict=True):
            found[place] = row[: len(tokens) - 1].gather(1, tokens[1:, None])[:, 0].tolist()
    return {"prompt_logprobs": [found[place] for place in range(len(asked))]}


def shortfalls(
    texts: dict[str, list[list[int]]], arguments: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """How far the logits of each host's tokens are below the largest, behind the same tokens: by host and tenant."""
    import torch

    asked, found = requests(arguments), {host: dict[str, dict[str, float]]() for host in texts}
    for tenant, places, model in references(arguments):
        for host, of_host in texts.items():
            short = []
            for place in places:
                prompt, text = asked[place][1], torch.tensor(of_host[place])
                logits = model(torch.tensor([prompt + of_host[place]])).logits[0, len(prompt) - 1 : -1]
                short.append(logits.amax(-1) - logits.gather(1, text[:, None])[:, 0])
            all_of = torch.cat(short)
            beyond = int((all_of > RIGHT_GAP).sum())
            found[host][tenant or "base"] = {"largest": float(all_of.max()), "beyond": beyond, "tokens": len(all_of)}
    return found


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
        max_num_seqs=max(arguments.sequences),
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
    asked = [
        ({"prompt_token_ids": tokens}, adapters.get(tenant) if tenant else None)
        for tenant, tokens, _ in requests(arguments)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True, logprobs=5)

    def answered(requests: list[Any], settings: Any) -> list[Any]:
        prompts, whose = map(list, zip(*requests, strict=True))
        found: list[Any] = llm.generate(prompts, settings, lora_request=whose, use_tqdm=False)
        return found

    def tokens(outputs: list[Any]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in outputs]

    found: dict[str, Any] = {"start_s": started}
    for count in arguments.sequences:
        llm.reset_prefix_cache()
        mixed, again = ([one for few in groups(asked, count) for one in answered(few, greedy)] for _ in range(2))
        logprobs = [
            [{str(token): value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs]
            for output in mixed
        ]
        found[str(count)] = {"texts": tokens(mixed), "again": tokens(again), "logprobs": logprobs}
    found["alone"] = tokens([answered([request], greedy)[0] for request in asked[::ALONE]])
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found["prompt_logprobs"] = [
        [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]] for output in answered(asked, scored)
    ]
    return found


def prompt_errors(
    exact: list[list[float]], found: list[list[float]], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Of each tenant, and of the base."""
    errors: dict[str, list[float]] = {}
    for (tenant, _, _), right, scores in zip(requests(arguments), exact, found, strict=True):
        errors.setdefault(tenant or "base", []).extend(abs(a - b) for a, b in zip(right, scores, strict=True))
    return {
        name: {"rms": math.sqrt(sum(error**2 for error in all_of) / len(all_of)), "largest": max(all_of)}
        for name, all_of in errors.items()
    }


def compared(
    expected: list[list[int]], found: dict[str, Any], alone: list[list[int]], arguments: argparse.Namespace
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    asked = requests(arguments)
    parted, right, canaries = [], 0, 0
    for (tenant, _, colour), mine, theirs, scores in zip(
        asked, found["texts"], expected, found["logprobs"], strict=True
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
        "alone_equal": sum(a == b for a, b in zip(alone, found["texts"][::ALONE], strict=True)),
        "alone_texts": len(alone),
        "parted": parted,
    }


if __name__ == "__main__":
    main()
