# SPDX-License-Identifier: Apache-2.0
"""Uploads, residents and decode steps of Llama-2-7B-sized tenants on one GPU, with random weights and codes.

    python benchmarks/runtime/serving.py --output benchmarks/results/serving.json

upload     a tenant from its file (page cache) and from pinned memory until steps can use it, against the copy rate of
           pinned memory measured beside it
capacity   tenants whose bytes really are on the GPU beside the base and 20 GB of cache, projections only, and with
           embeddings and lm_head of their own
decode     one step of a batch whose rows are all of different tenants, against the same step of the bare base without
           anything attached; both as CUDA graphs, median of --steps

Tenants have Delta-CoMe's published bands, whose ratio of 1/16 counts codes alone, or those of `compress --ratio 1/16`,
where every byte counts. Those of `capacity` and `decode` share their codes, not their bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deltaweave.formats import Delta
from deltaweave.runtime_plugin import library
from deltaweave.runtime_plugin.pytorch import Arena, Decoder, attach
from deltaweave.runtime_plugin.pytorch.cache import RowCache, attention_masks
from deltaweave.runtime_plugin.pytorch.context_switch import context_switch
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.pytorch.tenant import ParameterTable, load_tenant
from deltaweave.runtime_plugin.pytorch.upload import DeviceUploader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from random_delta import budget_bands, published_bands, random_delta
from results_file import circumstances, write_result

GIB = 1 << 30
DEVICE = "cuda"
KV_BYTES = 20e9
DEVICE_BYTES = 139 * GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 32], help="rows of a decode step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--length", type=int, default=512, help="positions of the cache")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU, and there is none")
    model = random_llama(arguments.layers)
    results: dict[str, Any] = {
        **circumstances(),
        "layers": arguments.layers,
    }
    with tempfile.TemporaryDirectory() as folder:
        deltas = Deltas(Path(folder), model)
        for part in arguments.parts:
            results[part] = PARTS[part](model, deltas, arguments)
            print(part, json.dumps(results[part], indent=2), flush=True)
            torch.cuda.empty_cache()
    write_result(arguments.output, results)


class Deltas:
    """Files of random codes, written when they are first asked for."""

    def __init__(self, folder: Path, model: Any) -> None:
        self._folder, self._model = folder, model

    def __getitem__(self, kind: str) -> Path:
        """`published` or `ratio`, which say the bands, with `-vocabulary` for 8-bit embeddings and lm_head."""
        path = self._folder / f"{kind}.safetensors"
        if not path.exists():
            bands = published_bands if kind.startswith("published") else budget_bands
            vocabulary = "dense" if kind.endswith("-vocabulary") else "none"
            random_delta(path, self._model, bands=bands, vocabulary=vocabulary, size=0.0)
        return path


def random_llama(layers: int) -> Any:
    """Llama-2-7B's shapes in bfloat16 on the GPU."""
    config = LlamaConfig(num_hidden_layers=layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=DEVICE)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    return model.eval()


def upload(model: Any, deltas: Deltas, arguments: argparse.Namespace) -> dict[str, Any]:
    """K7."""
    path = deltas["published"]
    rate = copy_rate()
    arena = Arena.for_model(model, capacity_bytes=4 * GIB, slots=3, vocabulary=32000)
    from_disk, from_pinned = [], []
    for _ in range(5):
        start = time.perf_counter()
        arena.add(path, "tenant", accept_base=True)
        arena.resident(["tenant"])
        torch.cuda.synchronize()
        from_disk.append(time.perf_counter() - start)
        for _ in range(3):
            arena.evict("tenant")
            torch.cuda.synchronize()
            start = time.perf_counter()
            arena.resident(["tenant"])
            torch.cuda.synchronize()
            from_pinned.append(time.perf_counter() - start)
        arena.remove("tenant")
    with Delta.open(path) as delta:
        stored = delta.size
    pinned = statistics.median(from_pinned)
    return {
        "file_bytes": stored,
        "copy_gb_s": rate / 1e9,
        "from_disk_s": statistics.median(from_disk),
        "from_disk_first_s": from_disk[0],
        "from_pinned_s": pinned,
        "from_pinned_gb_s": stored / pinned / 1e9,
        "share_of_copy_rate": stored / pinned / rate,
    }


def copy_rate() -> float:
    """Bytes a second from pinned memory to the GPU."""
    host, device = (
        torch.empty(GIB, dtype=torch.uint8, pin_memory=True),
        torch.empty(GIB, dtype=torch.uint8, device="cuda"),
    )
    return GIB / seconds(lambda: device.copy_(host, non_blocking=True), 5)


def capacity(model: Any, deltas: Deltas, arguments: argparse.Namespace) -> dict[str, Any]:
    """K8: one tenant's bytes, uploaded to as many places as there are."""
    base = sum(parameter.nbytes for parameter in model.parameters())
    room = int(min(DEVICE_BYTES, torch.cuda.mem_get_info()[1]) - base - KV_BYTES)
    found: dict[str, Any] = {"base_bytes": base, "kv_bytes": int(KV_BYTES), "room_bytes": room}
    for kind in ("published", "published-vocabulary", "ratio", "ratio-vocabulary"):
        path = deltas[kind]
        cache = torch.empty(int(KV_BYTES), dtype=torch.uint8, device="cuda")
        free = torch.cuda.mem_get_info()[0] - GIB  # for staging and the context
        table = ParameterTable(model, 32000)
        buffer = torch.empty(min(room, free) // 256 * 256, dtype=torch.uint8, device="cuda")
        book = library.Arena(
            native_library(),
            device_address=buffer.data_ptr(),
            size=buffer.numel(),
            slots=400,
            parameters=table.shapes(),
            max_rank=table.largest_rank(),
        )
        with Delta.open(path) as delta:
            tenant = load_tenant(table, delta, kind, accept_base=True)
            uploader = DeviceUploader(buffer)
            held = uploader.hold(tenant.records)
        shapes = [record.shape() for record in tenant.records]
        count = 0
        while True:
            try:
                slot = book.reserve(shapes)
            except library.ArenaFullError:
                break
            book.commit(slot)
            uploader.upload(held, book, slot)
            count += 1
        torch.cuda.synchronize()
        found[kind] = {"tenants": count, "bytes_each": book.tenant_bytes(shapes), "arena_bytes": buffer.numel()}
        del cache, buffer, uploader, held
        torch.cuda.empty_cache()
    return found


def decode(model: Any, deltas: Deltas, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of one token a row."""
    most = max(arguments.tenants)
    found: dict[str, Any] = {}
    bare = {rows: bare_step(model, rows, arguments) for rows in arguments.tenants}
    for kind in ("published", "published-vocabulary"):
        path = deltas[kind]
        with Delta.open(path) as delta:
            size = delta.size
        arena = Arena.for_model(model, capacity_bytes=int(1.05 * size * most) + GIB, slots=most, vocabulary=32000)
        with Delta.open(path) as delta:
            for number in range(most):
                arena.add(delta, f"t{number}", accept_base=True)
        with torch.no_grad(), attach(model, arena) as attachment:
            for rows in arguments.tenants:
                names = [f"t{number}" for number in range(rows)]
                decoder = Decoder(model, attachment, max_batch=rows, max_length=arguments.length)
                served, base = (step_time(decoder, attachment, who, arguments) for who in (names, [None] * rows))
                decoder.close()
                found[f"{kind}_{rows}"] = {
                    "rows": rows,
                    "tenants_ms": 1e3 * served,
                    "base_rows_ms": 1e3 * base,
                    "bare_ms": 1e3 * bare[rows],
                    "tokens_per_s": rows / served,
                    "over_bare": served / bare[rows],
                }
        del arena, attachment, decoder
        torch.cuda.empty_cache()
    return found


def step_time(decoder: Decoder, attachment: Any, names: list[str | None], arguments: argparse.Namespace) -> float:
    """Seconds of a replayed step whose rows are these tenants'."""
    with attachment.step(names):
        graph = decoder._graphs.get(len(names)) or decoder._capture(len(names))
        decoder._graphs[len(names)] = graph
        return seconds(graph.graph.replay, arguments.steps)


def bare_step(model: Any, rows: int, arguments: argparse.Namespace) -> float:
    """Seconds of the model's own step with the same cache, masks and attention."""
    cache = RowCache(model.config, rows, arguments.length, torch.bfloat16, torch.device("cuda"))
    ids = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    positions = torch.zeros_like(ids)

    def step() -> torch.Tensor:
        cache.aim(rows, positions, arguments.length)
        masks = attention_masks(model.config, positions, arguments.length)
        hidden = model.model(ids, attention_mask=masks, position_ids=positions, past_key_values=cache, use_cache=True)
        return model.lm_head(hidden.last_hidden_state)[:, 0]

    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return seconds(graph.replay, arguments.steps)


def seconds(work: Callable[[], object], count: int) -> float:
    """Median over `count` runs on the device's clock; two more come first."""
    context_switch(torch.cuda.current_device())()  # captures and uploads have changed streams
    times = []
    for _ in range(count + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[2:])


PARTS = {"upload": upload, "capacity": capacity, "decode": decode}

if __name__ == "__main__":
    main()
