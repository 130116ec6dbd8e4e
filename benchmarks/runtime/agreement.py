# SPDX-License-Identifier: Apache-2.0
"""Greedy texts of 32 tenants in one batch against 32 separate runs of base + dense delta, on the demo's trained models.

    python benchmarks/runtime/agreement.py --demo demo --output benchmarks/results/agreement.json

The dense models' own noise is measured beside it: their texts in a batch against their texts one by one. Tenants are
the demo's deltas in turn (those that an arena serves), each with a slot and bytes of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deltaweave.formats import Delta
from deltaweave.runtime_plugin.pytorch import Arena, AttachError, Decoder, Request, attach
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from results_file import circumstances, write_result

TENANTS = 32
DTYPES = {"cuda": ["float16", "bfloat16"], "cpu": ["float32"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `make demo`")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {
        **circumstances(arguments.device),
        "tenants": TENANTS,
        "tokens": arguments.tokens,
        "rows": [measure(arguments, getattr(torch, dtype)) for dtype in DTYPES[arguments.device]],
    }
    print(json.dumps(results, indent=2))
    write_result(arguments.output, results)


@torch.no_grad()
def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    base = arguments.demo / "pair" / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().to(arguments.device)
    arena = Arena.for_model(model, capacity_bytes=1 << 30, slots=TENANTS)
    files = [path for path in sorted((arguments.demo / "deltas").glob("*.safetensors")) if servable(arena, path)]
    tenants = {f"t{number}": files[number % len(files)] for number in range(TENANTS)}
    for name, path in tenants.items():
        arena.add(path, name, accept_base=True)
    prompts = read_prompts(arguments.demo)
    requests = {name: Request(prompt, name, arguments.tokens) for name, prompt in zip(tenants, prompts, strict=False)}
    with attach(model, arena) as served, Decoder(model, served, max_batch=TENANTS, max_length=256) as decoder:
        mixed = [completion.tokens for completion in decoder.run(list(requests.values()))]
        alone = [decoder.run([request])[0].tokens for request in requests.values()]
    dense, together = dense_texts(model, tenants, list(requests.values()))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "deltas": [path.name for path in files],
        "equal_to_dense": same(mixed, dense),
        "equal_to_own_run": same(mixed, alone),
        "dense_batch_equal_to_dense": same(together, dense),
        "first_difference": [first_difference(*pair) for pair in zip(mixed, dense, strict=True) if pair[0] != pair[1]],
    }


def servable(arena: Arena, path: Path) -> bool:
    try:
        arena.add(path, "probe", accept_base=True)
    except AttachError:
        return False
    arena.remove("probe")
    return True


def read_prompts(demo: Path) -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo / "pair" / "base")
    lines = (demo / "pair" / "tasks.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[:TENANTS]]


def dense_texts(
    model: Any, tenants: dict[str, Path], requests: Sequence[Request]
) -> tuple[list[list[int]], list[list[int]]]:
    """Transformers' own texts with each tenant's dense weights: every request alone, and among 32 copies of it."""
    one_by_one, batched = [], []
    for request in requests:
        assert request.tenant is not None
        ids = torch.tensor([list(request.tokens)], device=model.device)
        settings = {
            "max_new_tokens": request.max_new_tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with dense_weights(model, tenants[request.tenant]):
            for texts, copies in ((one_by_one, 1), (batched, TENANTS)):
                rows = ids.repeat(copies, 1)
                found = model.generate(rows, attention_mask=torch.ones_like(rows), **settings)
                texts.append(found[0, ids.shape[1] :].tolist())
    return one_by_one, batched


@contextmanager
def dense_weights(model: Any, path: Path) -> Iterator[None]:
    """The fine-tune's weights in the place of the base's, rounded once."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with Delta.open(path) as delta:
        for name, parameter in model.named_parameters():
            if name in delta.names:
                tuned = delta.apply_to(name, parameter.detach().float().cpu().numpy())
                parameter.copy_(torch.from_numpy(tuned))
    yield
    for name, parameter in model.named_parameters():
        parameter.copy_(before[name])


def same(mine: Sequence[list[int]], theirs: Sequence[list[int]]) -> int:
    return sum(left == right for left, right in zip(mine, theirs, strict=True))


def first_difference(mine: list[int], theirs: list[int]) -> int:
    return next(place for place, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])


if __name__ == "__main__":
    main()
