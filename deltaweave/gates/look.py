# SPDX-License-Identifier: Apache-2.0
"""What a gate does with a text: the weights that every layer gives every token's experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaweave.converter import Checkpoint
from deltaweave.gates.experts import GateError, fusion_experts
from deltaweave.gates.mixture import attach_mixture, weigher_of
from deltaweave.generation import encode_prompt
from deltaweave.models import load_checkpoint, load_tokenizer

__all__ = ["GateMap", "look"]


@dataclass(frozen=True)
class GateMap:
    """Weights over one text.

    Attributes:
        experts: names, in the gate's order.
        tokens: the text of every token.
        prompt_tokens: how many of them are the prompt's; the others were written.
        weights: [experts, layers, tokens] float32.
    """

    experts: tuple[str, ...]
    tokens: tuple[str, ...]
    prompt_tokens: int
    weights: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """For machines: `weights` by expert, a list of layers of lists of tokens."""
        return {
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt_tokens,
            "weights": {
                name: [[round(float(value), 6) for value in layer] for layer in weights]
                for name, weights in zip(self.experts, self.weights, strict=True)
            },
            "mean": {name: round(float(w.mean()), 6) for name, w in zip(self.experts, self.weights, strict=True)},
        }


@torch.no_grad()
def look(
    fusion: str | Path,
    base: str | Path,
    prompt: str,
    *,
    new_tokens: int = 0,
    chat: bool = False,
    device: str | None = None,
    accept_base: bool = False,
) -> GateMap:
    """Runs a prompt, and the greedy text after it, through base + fusion and keeps the gates' weights.

    Args:
        fusion: the file.
        base: Hugging Face folder of its base.
        prompt: the text.
        new_tokens: how much to write, at most.
        chat: wrap the prompt in the chat template.
        device: None takes the GPU if there is one.
        accept_base: take a base whose fingerprint is not the fusion's.

    Raises:
        DeltaweaveError: another base, an unreadable file, an empty prompt, no chat template.
    """
    opened, loras = fusion_experts(fusion)
    checkpoint = Checkpoint.open(base)
    if not accept_base and checkpoint.fingerprint() != opened.base.fingerprint:
        raise GateError(
            f"{base}: is not the base of {fusion} ({opened.base.name}); --accept-base takes it all the same"
        )
    tokenizer = load_tokenizer(base)
    ids = encode_prompt(tokenizer, prompt, chat)
    given = len(ids)
    model = load_checkpoint(base).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with attach_mixture(model, loras, weigher_of(opened.gate)) as mixture:
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
        # Written without a cache, so that one forward has seen all tokens in the end; prompts are short.
        while len(ids) < given + new_tokens and (token := int(logits[0, -1].argmax())) != tokenizer.eos_token_id:
            ids.append(token)
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
        weights = mixture.weights()[:, 0]
    weights = weights.expand(-1, len(ids), -1).permute(2, 0, 1).cpu()
    tokens = tuple(tokenizer.decode([token]) for token in ids)
    return GateMap(tuple(lora.name for lora in loras), tokens, given, weights.numpy())
