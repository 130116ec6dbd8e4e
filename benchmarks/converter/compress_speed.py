# SPDX-License-Identifier: Apache-2.0
"""Seconds, by part, that compressing a whole model takes, with peak memory of the GPU and of the host.

    python benchmarks/converter/compress_speed.py --shape 7b --folder /tmp/pair --output 7b.json

Writes a synthetic pair at the model's shapes (27 GB for 7b, kept with --keep), then compresses it in a process of its
own, with `--recipe` and the default calibration: 128 sequences of 2048 tokens. `seconds` is that process's life,
imports included. A `--folder` in a RAM disk spares the time of writing the pair. Fewer `--layers` than the model has
give a shorter run, and the result says so: nothing is extrapolated. `--check-moments` compares the second moments of
the first layer with float64; that costs time of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from parts import Parts
from results_file import circumstances, write_result
from synthetic import SHAPES, write_pair

SAMPLES, LENGTH = 128, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer decoder blocks [default: the model's]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="triple", help="a preset's name [default: triple]")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--sequence-length", type=int, default=LENGTH)
    parser.add_argument("--folder", type=Path, help="where the pair is written [default: a temporary folder]")
    parser.add_argument("--pair", type=Path, nargs=2, help="compress these two checkpoints instead of a synthetic pair")
    parser.add_argument("--keep", action="store_true", help="keep the pair, and use it if it is there")
    parser.add_argument("--check-moments", action="store_true", help="check the second moments of the first layer")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--step", choices=["write", "compress"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or SHAPES[arguments.shape].layers
    if arguments.step:
        steps = {"write": write_step, "compress": compress_step}
        steps[arguments.step](arguments)
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder)) if not arguments.keep else arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(arguments, folder)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print_table(result)
    write_result(arguments.output, result)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs both steps as processes; a GPU's memory is then nobody else's."""
    given = [value for value in sys.argv[1:] if value != "--keep"]
    pair = arguments.pair or (folder / "base", folder / "tuned")
    writing = 0.0
    if not (pair[1] / "config.json").exists():
        writing, _ = watch([sys.executable, __file__, *given, "--folder", str(folder), "--step", "write"])
    command = [sys.executable, __file__, *given, "--folder", str(folder), "--step", "compress"]
    seconds, host_bytes = watch(command)
    measured = json.loads((folder / "measured.json").read_text())
    shape = SHAPES[arguments.shape]
    layers = json.loads((pair[1] / "config.json").read_text())["num_hidden_layers"]
    return {
        **circumstances(arguments.device),
        "cpus": os.cpu_count(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "model": "given pair" if arguments.pair else arguments.shape,
        "recipe": arguments.recipe,
        "layers": layers,
        "whole_model": arguments.pair is not None or layers == shape.layers,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "pair_bytes": sum(file.stat().st_size for path in pair for file in path.glob("*.safetensors")),
        "seconds_to_write_the_pair": round(writing, 1),
        "seconds": round(seconds, 1),
        "peak_host_bytes": host_bytes,
        **measured,
    }


def watch(command: list[str]) -> tuple[float, int]:
    """(seconds, peak of anonymous memory) of a process; mapped files are page cache, not memory, on a RAM disk too."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, process_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with status {process.returncode}")
    return time.monotonic() - start, peak


def process_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def write_step(arguments: argparse.Namespace) -> None:
    write_pair(arguments.folder, SHAPES[arguments.shape], arguments.layers, torch.device(arguments.device))
    os.sync()  # the pair is on the disk, not on its way there, when the clock starts


def compress_step(arguments: argparse.Namespace) -> None:
    from deltaweave.converter import CompressionOptions, Recipe, compress

    moments = check_moments() if arguments.check_moments else None
    parts = Parts()
    pair = arguments.pair or (arguments.folder / "base", arguments.folder / "tuned")
    options = CompressionOptions(
        Recipe.preset(arguments.recipe),
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        device=arguments.device,
    )
    layers = LayerClock()
    with GpuMemory(arguments.device) as memory:
        start = time.monotonic()
        target = arguments.folder / "delta.safetensors"
        output = compress(*pair, target, options, force=True, restart=True, progress=layers)
        seconds = time.monotonic() - start
    measured = {
        "seconds_in_compress": round(seconds, 1),
        "seconds_of_layers": layers.seconds,
        "peak_gpu_bytes": memory.peak_used,
        "peak_gpu_bytes_allocated": memory.peak_allocated,
        "file_bytes": output.stat().st_size,
        "moments": moments,
        "parts": parts.to_json(),
    }
    (arguments.folder / "measured.json").write_text(json.dumps(measured))
    output.unlink()


class LayerClock:
    """A progress function that notes when each layer begins; the last one's end is not told."""

    def __init__(self) -> None:
        self._begun: list[float] = []

    def __call__(self, description: str, done: float, total: float) -> None:
        if description == "compressing" and int(done) == len(self._begun):
            self._begun.append(time.monotonic())

    @property
    def seconds(self) -> list[float]:
        """From each layer's beginning to the next one's."""
        return [round(after - before, 2) for before, after in itertools.pairwise(self._begun)]


class GpuMemory:
    """What the whole GPU holds at most, driver and libraries included, sampled; and PyTorch's own exact peak."""

    def __init__(self, device: str) -> None:
        self._gpu, self._done = device == "cuda", threading.Event()
        self.peak_used = self.peak_allocated = 0

    def __enter__(self) -> GpuMemory:
        if self._gpu:
            torch.cuda.init()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self._done.set()
            self._thread.join()
            self.peak_allocated = torch.cuda.max_memory_allocated()

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            self.peak_used = max(self.peak_used, total - free)


def check_moments() -> dict[str, float]:
    """Wraps the second moments of the first layer's four stages; fills in each one's error relative to float64."""
    from deltaweave.converter import calibration

    errors: dict[str, float] = {}
    exact: list[torch.Tensor] = []
    add, whole = calibration.add_gram, calibration.BlockStream.second_moment

    def added(total: torch.Tensor, x: torch.Tensor, weight: float) -> None:
        add(total, x, weight)
        if len(errors) < 4:
            if not exact:
                exact.append(torch.zeros(total.shape, dtype=torch.float64, device=total.device))
            exact[0].addmm_(x.double().T, x.double(), alpha=weight)

    def checked(stream: Any, projection: Any, *arguments: Any) -> torch.Tensor:
        moment = whole(stream, projection, *arguments)
        if exact:
            reference = exact.pop()
            errors[projection.module] = float((moment - reference).norm() / reference.norm())
        return moment

    calibration.add_gram, calibration.BlockStream.second_moment = added, checked
    return errors


def print_table(result: dict[str, Any]) -> None:
    whole = "" if result["whole_model"] else f", {result['layers']} layers only: no figure of the whole model"
    print(f"\n{result['model']}{whole}: {result['seconds']:.1f} s ({result['seconds_in_compress']:.1f} s in compress)")
    if result["seconds_of_layers"]:
        print(f"a layer: median {statistics.median(result['seconds_of_layers']):.2f} s")
    print(
        f"peak GPU {result['peak_gpu_bytes'] / 1e9:.2f} GB, PyTorch's {result['peak_gpu_bytes_allocated'] / 1e9:.2f} GB"
    )
    print(f"peak host {result['peak_host_bytes'] / 1e9:.2f} GB, file {result['file_bytes'] / 1e9:.3f} GB")
    print(f"pair of {result['pair_bytes'] / 1e9:.1f} GB written in {result['seconds_to_write_the_pair']:.1f} s\n")
    print(f"{'part':44} {'calls':>6} {'thread s':>9} {'stream s':>9}")
    for part in result["parts"]:
        stream = "" if part["stream_seconds"] is None else f"{part['stream_seconds']:9.2f}"
        print(f"{part['part']:44} {part['calls']:6} {part['host_seconds']:9.2f} {stream}")
    for module, error in (result["moments"] or {}).items():
        print(f"second moment of {module}: relative error {error:.1e}")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
