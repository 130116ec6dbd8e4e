# SPDX-License-Identifier: Apache-2.0
"""A synthetic pair of Hugging Face checkpoints at a real model's shapes, written in bfloat16 shards.

The base is random. The fine-tune differs in every tensor; a projection's delta is 2 % of its weight's norm and has
singular values that fall as those of fine-tunes do, fast at first and slowly in a long tail.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["SHAPES", "Shape", "write_pair"]

DELTA_NORM = 0.02
LAYERS_PER_SHARD = 4
WRITERS = 8


@dataclass(frozen=True)
class Shape:
    """Extents of a Llama model."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "tiny": Shape(256, 640, 4, 4, 4, 6000),
}


def write_pair(folder: Path, shape: Shape, layers: int, device: torch.device) -> tuple[Path, Path]:
    """Writes `folder/base` and `folder/tuned`, `layers` decoder blocks each, and returns them."""
    pair = folder / "base", folder / "tuned"
    shards = _shards(shape, layers)
    with ThreadPoolExecutor(WRITERS) as pool:
        written = []
        for target in pair:
            target.mkdir(parents=True)
            _config(shape, layers).save_pretrained(target)
            _tokenizer().save_pretrained(target)
            make = _tuned if target.name == "tuned" else _base
            weight_map = {}
            for number, tensors in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                weight_map |= dict.fromkeys(tensors, name)
                written.append(pool.submit(_write_shard, target / name, tensors, make, device))
            index = {"metadata": {}, "weight_map": weight_map}
            (target / "model.safetensors.index.json").write_text(json.dumps(index))
        for shard in written:
            shard.result()
    return pair


def _config(shape: Shape, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the calibration text, so that the embedding's rows are many, as in a real run."""
    text = files("deltaweave.converter").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))[:5000]
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _shards(shape: Shape, layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of all tensors by name, a shard after the other."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    vocabulary = (shape.vocabulary, shape.hidden)
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": vocabulary}]
    for layer in range(layers):
        if layer % LAYERS_PER_SHARD == 0:
            shards.append({})
        shards[-1] |= {f"model.layers.{layer}.{name}.weight": extents for name, extents in block.items()}
    return [*shards, {"model.norm.weight": (shape.hidden,), "lm_head.weight": vocabulary}]


def _write_shard(
    path: Path,
    tensors: dict[str, tuple[int, ...]],
    make: Callable[[str, tuple[int, ...], torch.device], torch.Tensor],
    device: torch.device,
) -> None:
    """A safetensors file, one tensor in memory at a time."""
    header, end = {}, 0
    for name, extents in tensors.items():
        start, end = end, end + 2 * torch.Size(extents).numel()
        header[name] = {"dtype": "BF16", "shape": list(extents), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, extents in tensors.items():
            file.write(make(name, extents, device).bfloat16().cpu().contiguous().view(torch.uint8).numpy().data)


def _generator(name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))


def _base(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A random weight that keeps activations of unit size; norms near one."""
    noise = torch.randn(shape, generator=_generator(name, device), device=device)
    return 1 + 0.1 * noise if len(shape) == 1 else noise / shape[1] ** 0.5


def _tuned(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The base's weight and a change; a projection's has a decaying spectrum."""
    base = _base(name, shape, device)
    generator = _generator(name + " tuned", device)
    if len(shape) == 1 or not name.endswith("_proj.weight"):
        return base + 0.01 * base.std() * torch.randn(shape, generator=generator, device=device)
    rank = min(shape)
    sigma = (1 + torch.arange(rank, device=device) / 8) ** -0.7
    left = torch.randn(shape[0], rank, generator=generator, device=device)
    delta = (left * sigma) @ torch.randn(rank, shape[1], generator=generator, device=device)
    return base + delta * (DELTA_NORM * base.norm() / delta.norm())
