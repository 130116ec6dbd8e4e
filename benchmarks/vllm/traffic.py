# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` under random traffic: loads, unloads and evictions beside requests whose answers tell the tenant.

    python benchmarks/vllm/traffic.py --base DIR --family WORK --output benchmarks/results/vllm_traffic.json

WORK is what `fine_tunes.py` wrote, or `tiny_fine_tunes.py` for vLLM's CPU build (`--server-options "--enforce-eager
--dtype bfloat16"`). Its three deltas get twelve names; four fit on the device at a time and eight in host memory, so
that most requests bring a tenant back from there or from its file. One more name is loaded, asked and unloaded all
the time, each time with another file. Every answer must be the one that the name's fine-tune gives. Memory of the
server's processes and of the device is read every ten seconds, and told with the counts so far.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from fine_tunes import NAMES, TENANTS, question
from work import FUSION, Family, family_parser

CLIENTS = 12
WATCH = 10.0


def main() -> None:
    parser = family_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--port", type=int, default=8077)
    parser.add_argument("--server-options", default="", help="more of them, such as --enforce-eager")
    arguments = parser.parse_args()
    import torch
    from results_file import circumstances, write_result

    family: Family = arguments.family
    folder = family.folder / "served"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(8):
        (folder / f"folder{number}.safetensors").symlink_to(family.file(TENANTS[number % 3]))
    with Server(arguments, folder) as server:
        checks = endpoints(server, arguments)
        print(json.dumps(checks), flush=True)
        traffic = Traffic(server, arguments).run()
        results = {
            **circumstances("cuda" if torch.cuda.is_available() else "cpu"),
            "start_s": server.start_s,
            "endpoints": checks,
            "traffic": traffic,
            "metrics": server.metrics(),
        }
    print(json.dumps(results, indent=1))
    write_result(arguments.output, results)
    if traffic["wrong"] or traffic["errors"]:
        sys.exit(1)


class Server:
    """A `vllm serve` of the base, its own process group."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        environment = {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder),
        }
        options = [
            "--quantization", "deltaweave", "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8",
            "--served-model-name", "base", "--port", str(arguments.port),
            "--max-model-len", "512", "--max-num-seqs", "64",
            "--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.02",
            "--additional-config", json.dumps({"deltaweave": {"arena_gib": 0.5}}),
            "--lora-modules",
            *(f"{name}={path}" for name, path in arguments.family.files.items()),
        ]  # fmt: skip
        options += arguments.server_options.split()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(arguments.base.resolve()), *options]
        self._address = f"http://127.0.0.1:{arguments.port}"
        began = time.monotonic()
        self.log = arguments.family.folder / "server.log"
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=arguments.family.folder,  # not a folder that has packages: `-m` puts it first on the path
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while True:
            try:
                urllib.request.urlopen(f"{self._address}/health", timeout=2)
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() - began > 240:
                    self.close()
                    raise SystemExit(f"the server did not start:\n{self.log.read_text()[-6000:]}") from None
                time.sleep(0.5)
        self.start_s = time.monotonic() - began

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        tail = [line for line in self.log.read_text().splitlines() if "ERROR" in line or "Traceback" in line]
        print("server's errors:", *tail[-30:], sep="\n")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)

    def call(self, path: str, body: Any = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:  # no answer at all: an error like others, not the end of the thread that asked
            time.sleep(1)
            return 0, str(error)

    def ask(self, model: str, prompt: str, tokens: int = 3) -> tuple[int, str]:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        status, answer = self.call("/v1/completions", body)
        return status, json.loads(answer)["choices"][0]["text"] if status == 200 else answer

    def load(self, name: str, path: Path) -> tuple[int, str]:
        return self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> tuple[int, str]:
        return self.call("/v1/unload_lora_adapter", {"lora_name": name})

    def models(self) -> list[str]:
        return [model["id"] for model in json.loads(self.call("/v1/models")[1])["data"]]

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.call("/metrics")[1].splitlines() if line.startswith("deltaweave")]
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def memory(self) -> dict[str, float]:
        """MiB of all processes of the server: resident, and on the device; -1 for what cannot be read."""
        group, resident, processes = self._process.pid, 0, set()  # it began a session, so it leads its group
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == group:
                    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                    resident += int(fields.get("VmRSS", "0 kB").split()[0])
                    processes.add(status.parent.name)
            except OSError:
                continue
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        found = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
        apps = [line.partition(", ") for line in found.stdout.splitlines()] if found else []
        device = [int(used) for process, _, used in apps if process in processes and used.isdecimal()]
        return {"host_mib": resident / 1024, "device_mib": sum(device) if device else -1}


def endpoints(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """One try of each way to a tenant."""
    canaries, name = arguments.family.answers, NAMES[0]
    found: dict[str, Any] = {"models": server.models()}
    found["canaries"] = {tenant: server.ask(tenant, question(name)) for tenant in ("base", *TENANTS, FUSION)}
    found["right"] = all(found["canaries"][tenant][1].startswith(canaries[tenant][name]) for tenant in TENANTS)
    found["from_folder"] = server.ask("folder1", question(name))
    found["no_such"] = server.ask("nobody", question(name))[0]
    found["out_of_folder"] = server.ask("../t0", question(name))[0]
    found["no_file"] = server.load("ghost", arguments.family.file("ghost"))
    broken = arguments.family.file("broken")
    broken.write_bytes(b"no delta at all, but long enough to be read as a header")
    found["broken"] = server.load("broken", broken)
    found["alive"] = server.ask("t1", question(name))[0]
    chat = {"model": "t0", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    found["chat"] = server.call("/v1/chat/completions", chat)[0]
    return found


class Traffic:
    """Clients that ask at random, and one that loads and unloads."""

    def __init__(self, server: Server, arguments: argparse.Namespace) -> None:
        self.server, self.seconds = server, arguments.seconds
        self.family: Family = arguments.family
        # Questions of which it is known what the fine-tune says.
        self.answers = {
            tenant: {name: text for name, text in of_tenant.items() if text}
            for tenant, of_tenant in self.family.answers.items()
        }
        self.lock = threading.Lock()
        self.counts = {"asked": 0, "right": 0, "swaps": 0, "long": 0}
        self.wrong: list[Any] = []
        self.errors: list[Any] = []
        self.latencies: list[float] = []
        self.memory: list[dict[str, float]] = []

    def run(self) -> dict[str, Any]:
        names = {f"n{number}": TENANTS[number % 3] for number in range(12)}
        for name, tenant in names.items():
            status, answer = self.server.load(name, self.family.file(tenant))
            if status != 200:
                self.errors.append((name, status, answer[:300]))
        names |= {f"folder{number}": f"t{number % 3}" for number in range(8)}
        self.end = time.monotonic() + self.seconds
        threads = [threading.Thread(target=self._client, args=(names, seed)) for seed in range(CLIENTS)]
        threads += [threading.Thread(target=work) for work in (self._swapper, self._writer, self._watcher)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        waits = sorted(self.latencies)
        return {
            **self.counts,
            "wrong": self.wrong[:20],
            "errors": self.errors[:20],
            "memory": self.memory,
            "latency_ms": {share: 1e3 * waits[int(share * (len(waits) - 1))] for share in (0.5, 0.95, 0.99, 1.0)},
        }

    def _check(self, model: str, tenant: str, name: str) -> None:
        began = time.monotonic()
        status, text = self.server.ask(model, question(name))
        with self.lock:
            self.latencies.append(time.monotonic() - began)
            self.counts["asked"] += 1
            if status != 200:
                self.errors.append((model, status, text[:300]))
            elif text.startswith(self.answers[tenant][name]):
                self.counts["right"] += 1
            else:
                self.wrong.append((model, tenant, name, text))

    def _client(self, names: dict[str, str], seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            model, tenant = draw.choice(list(names.items()))
            self._check(model, tenant, draw.choice(list(self.answers[tenant])))

    def _swapper(self) -> None:
        """The same name, another file every time: a cached prefix of the last one must not be found."""
        draw = random.Random(99)
        while time.monotonic() < self.end:
            tenant = draw.choice(TENANTS)
            status, answer = self.server.load("swap", self.family.file(tenant))
            if status != 200:
                with self.lock:
                    self.errors.append(("load", status, answer[:300]))
                continue
            for _ in range(3):
                self._check("swap", tenant, draw.choice(list(self.answers[tenant])[:4]))
            self.server.unload("swap")
            self.counts["swaps"] += 1

    def _watcher(self) -> None:
        """Memory as it goes: what is only warm-up comes to an end."""
        began = time.monotonic()
        while True:
            now = time.monotonic()
            self.memory.append({"second": round(now - began), **self.server.memory()})
            found = {"wrong": len(self.wrong), "errors": len(self.errors)}
            print(json.dumps({**self.memory[-1], **self.counts, **found}), flush=True)
            if now >= self.end:
                return
            time.sleep(min(WATCH, self.end - now))

    def _writer(self) -> None:
        """Long texts of the base and the fusion, so that decode steps are always under way."""
        draw = random.Random(5)
        while time.monotonic() < self.end:
            status, text = self.server.ask(draw.choice(["base", FUSION]), "Once upon a time", 200)
            with self.lock:
                self.counts["long"] += 1
                if status != 200:
                    self.errors.append(("long", status, text[:300]))


if __name__ == "__main__":
    main()
