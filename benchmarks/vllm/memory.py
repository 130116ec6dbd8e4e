# SPDX-License-Identifier: Apache-2.0
"""Why the memory of the server in `traffic.py` grows: tenants alone without vLLM, and a server that loads none.

    python benchmarks/vllm/memory.py --base DIR --family WORK --output FILE

With vLLM's CPU build give `--server-options "--enforce-eager --dtype bfloat16"`.
First, in this process, as many tenants' files are read, uploaded and evicted as the traffic has in minutes, on the CPU.
Then `vllm serve` with the same options answers requests of the base from twelve clients, and never sees a tenant.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from typing import Any

from fine_tunes import NAMES, question
from traffic import CLIENTS, WATCH, Server
from work import family_parser

AT_ONCE, HELD, TENANTS = 4, 8, 20


def main() -> None:
    parser = family_parser(__doc__)
    parser.add_argument("--server-options", default="", help="more of them, such as --enforce-eager")
    parser.add_argument("--steps", type=int, default=3000, help="of tenants alone")
    parser.add_argument("--seconds", type=float, default=200, help="of the server; 0 leaves it out")
    arguments = parser.parse_args()
    import torch
    from results_file import circumstances, write_result

    results: dict[str, Any] = {**circumstances("cpu"), "threads": torch.get_num_threads()}
    results["tenants_alone"] = tenants_alone(arguments)
    write_result(arguments.output, results)
    if arguments.seconds:
        results["base_alone"] = base_alone(arguments)
        write_result(arguments.output, results)


def tenants_alone(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of three of twenty tenants, four on the device and eight in host memory; every tenth has a new one."""
    import torch
    from deltaweave.runtime_plugin.pytorch import Arena
    from deltaweave.runtime_plugin.vllm.step import Step
    from deltaweave.runtime_plugin.vllm.table import BaseFiles, RankTable
    from deltaweave.runtime_plugin.vllm.tenants import Adapter, Tenants

    table = RankTable(BaseFiles(arguments.base))
    arena = Arena(table, capacity_bytes=1 << 26, slots=AT_ONCE, device=torch.device("cpu"), max_rank=512)
    step = Step(arena, tokens=2048, fusions=True, delta_experts=0)
    tenants = Tenants(step, at_once=AT_ONCE, most=HELD, accept_base=False)
    files = list(arguments.family.files.values())
    known = [Adapter(number, f"n{number}", str(files[number % len(files)])) for number in range(1, 1 + TENANTS)]
    draw, found = random.Random(0), []
    for turn in range(arguments.steps + 1):
        chosen = draw.sample(known, 3)
        if turn % 10 == 0:
            chosen.append(Adapter(100 + turn, "swap", str(files[turn // 10 % len(files)])))
        for adapter in chosen:
            if (reading := tenants.read_ahead(adapter)) is not None:
                reading.result()
        ids = [adapter.id for adapter in chosen]
        tenants.begin([number for number in ids for _ in range(8)], ids, {adapter.id: adapter for adapter in chosen})
        if turn % 500 == 0:
            found.append({"step": turn, "loads": tenants.counts.loads, "host_mib": round(resident_mib(), 1)})
            print(found[-1], flush=True)
    return found


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def base_alone(arguments: argparse.Namespace) -> list[dict[str, float]]:
    asked, found = [0] * CLIENTS, []
    folder = arguments.family.folder / "served"
    folder.mkdir(exist_ok=True)
    with Server(arguments, folder) as server:
        began = time.monotonic()
        end = began + arguments.seconds

        def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                server.ask("base", question(draw.choice(NAMES)))
                asked[number] += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            seconds = round(time.monotonic() - began)
            found.append({"second": seconds, "asked": sum(asked), "host_mib": round(server.memory()["host_mib"], 1)})
            print(found[-1], flush=True)
            time.sleep(WATCH)
        for thread in threads:
            thread.join()
    return found


if __name__ == "__main__":
    main()
