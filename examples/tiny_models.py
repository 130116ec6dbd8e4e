# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama and random fine-tunes of it, so that the examples need no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["write_random_family"]


def write_random_family(folder: Path, tuned: Sequence[str], change: float) -> Path:
    """Writes checkpoints `base` and one for each name, with a tokenizer of single characters.

    Args:
        folder: where.
        tuned: names of the fine-tunes.
        change: of all their weights, in standard deviations of the base's.

    Returns:
        The base's folder; the others are beside it.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in ("base", *tuned):
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                spread = weights[key].float().std().nan_to_num(1)
                parameter.copy_(weights[key] + change * spread * torch.randn_like(weights[key].float()))
    return folder / "base"
