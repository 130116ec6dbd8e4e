# SPDX-License-Identifier: Apache-2.0
"""Peak anonymous memory of `compress` with the layer shapes of a 1.5B model, for 2 and 4 layers.

    python benchmarks/memory.py --layers 2 4 --output benchmarks/results/memory.json

Anonymous memory is what a process holds beyond the page cache (`Anonymous` of /proc/PID/smaps_rollup, sampled every
50 ms). Checkpoints and activations are mapped files, so the peak must not grow with the number of layers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import tiny_tokenizer
from results_file import circumstances, write_result

HIDDEN, MLP, HEADS, KV_HEADS = 1536, 8960, 12, 2  # Qwen2-1.5B
LIMIT = 2.5e9
CHILD = """
import sys
from deltaweave.converter import CompressionOptions, Recipe, compress
base, tuned, output, samples, length, device = sys.argv[1:]
options = CompressionOptions(Recipe.preset('triple'), samples=int(samples), sequence_length=int(length), device=device)
compress(base, tuned, output, options)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="cpu", help="where compress runs")
    parser.add_argument("--folder", type=Path, help="where the pairs are written [default: a temporary folder]")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            rows.append(measure(folder, layers, arguments.samples, arguments.sequence_length, arguments.device))
        finally:
            shutil.rmtree(folder)
        print(json.dumps(rows[-1]), flush=True)
    result = {
        **circumstances(arguments.device),
        "limit_bytes": LIMIT,
        "rows": rows,
    }
    write_result(arguments.output, result)
    sys.exit(0 if max(row["peak_anonymous_bytes"] for row in rows) < LIMIT else 1)


def measure(folder: Path, layers: int, samples: int, length: int, device: str) -> dict[str, float]:
    base, tuned = write_pair(folder, layers)
    command = [sys.executable, "-c", CHILD, str(base), str(tuned), str(folder / "delta.safetensors")]
    start = time.monotonic()
    process = subprocess.Popen([*command, str(samples), str(length), device], stdout=subprocess.DEVNULL, cwd=folder)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"compress failed with status {process.returncode}")
    seconds = time.monotonic() - start
    return {
        "layers": layers,
        "samples": samples,
        "sequence_length": length,
        "peak_anonymous_bytes": peak,
        "seconds": round(seconds, 1),
    }


def anonymous_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def write_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)
    tensors = random_weights(layers, len(tokenizer), generator)
    change = {name: tensor + 0.02 * tensor.std() * noise(tensor.shape, generator) for name, tensor in tensors.items()}
    folders = folder / "base", folder / "tuned"
    for target, content in zip(folders, (tensors, change), strict=True):
        target.mkdir()
        config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        save_file({name: tensor.bfloat16() for name, tensor in content.items()}, target / "model.safetensors")
    return folders


def random_weights(layers: int, vocabulary: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    kv = HIDDEN // HEADS * KV_HEADS
    linear = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    tensors = {
        "model.embed_tokens.weight": noise((vocabulary, HIDDEN), generator),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in linear.items():
            tensors[f"{prefix}{name}.weight"] = noise(shape, generator) / shape[1] ** 0.5
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}self_attn.{name}.bias"] = torch.zeros(linear[f"self_attn.{name}"][0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN)
    return tensors


def noise(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
