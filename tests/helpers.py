# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints for tests: every family, as Hugging Face folders that Transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "perturbed", "tiny_checkpoint", "tiny_tokenizer"]

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;+-*/=()?!'\"\n"
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
) -> Path:
    """Writes a random model of `family` (4 heads over 2 KV heads, MLP of 2.5 times `hidden`) and returns its folder."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero: give both something to carry
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    tokenizer.save_pretrained(folder)
    return folder


def perturbed(
    base: Path,
    folder: Path,
    *,
    scale: float = 0.3,
    embeddings: bool = True,
    added_tokens: int = 0,
    seed: int = 1,
) -> Path:
    """Writes a full fine-tune of `base`: every projection changed with a decaying spectrum, norms and biases too.

    Args:
        base: a folder of `tiny_checkpoint`.
        folder: where to write.
        scale: size of the change relative to the weight.
        embeddings: change them (and an untied lm_head) too.
        added_tokens: new vocabulary rows at the end.
        seed: of the change.
    """
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "embed" in name or "lm_head" in name:
                if embeddings:
                    tensors[name] = _changed(tensor, 0.05, generator)
                if added_tokens:
                    rows = 0.1 * torch.randn(added_tokens, tensor.shape[1], generator=generator)
                    tensors[name] = torch.cat([tensors[name], rows.to(tensor.dtype)])
            else:
                tensors[name] = _changed(tensor, scale, generator)
        save_file(tensors, file, metadata={"format": "pt"})
    if added_tokens:
        _grow_vocabulary(folder, added_tokens)
    return folder


def _changed(tensor: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    values = tensor.float()
    if values.ndim == 1:
        change = torch.randn(values.shape, generator=generator)
    else:
        rank = min(values.shape)
        spectrum = 0.93 ** torch.arange(rank)
        left = torch.randn(values.shape[0], rank, generator=generator)
        change = left * spectrum @ torch.randn(rank, values.shape[1], generator=generator)
    return (values + scale * change * values.norm() / change.norm()).to(tensor.dtype)


def _grow_vocabulary(folder: Path, added: int) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size += added
    config.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"<added{index}>" for index in range(added)])
    tokenizer.save_pretrained(folder)
