# SPDX-License-Identifier: Apache-2.0
"""Whether a delta fits a model in memory: the base that it was made from, and its rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deltaweave.formats import BaseIdentity, tensor_digest
from deltaweave.runtime_plugin.fit import AttachError
from torch import nn
from transformers import PretrainedConfig

__all__ = ["require_base", "rotary_embedding"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of the base's smallest tensors that are compared with the delta's digests: a tenth of a second.
CHECKED_BYTES = 1 << 26


def rotary_embedding(base: nn.Module, tuned: PretrainedConfig) -> nn.Module:
    """A model's rotary embedding as the fine-tune's configuration has it, on the same device.

    Raises:
        AttachError: parameters that Transformers cannot use.
    """
    kind: Any = type(base)
    try:
        rotary: nn.Module = kind(config=tuned)
    except Exception as error:  # whatever Transformers makes of values that are none
        reason = str(error).partition("\n")[0]
        raise AttachError(f"config.json: unusable rope_parameters of the delta ({reason})") from error
    return rotary.to(next(base.buffers()).device)


def require_base(find: Callable[[str], torch.Tensor | None], base: BaseIdentity) -> None:
    """Compares the smallest tensors with the base's digests; a lossless cast passes.

    Args:
        find: a tensor of the model by its name, if there is one.
        base: that a delta was made from.

    Raises:
        AttachError: a tensor of other values, or none that can be compared.
    """
    left, compared = CHECKED_BYTES, 0
    for name, entry in sorted(base.tensors.items(), key=lambda item: (torch.Size(item[1].shape).numel(), item[0])):
        tensor = find(name)
        if tensor is None or entry.dtype not in DTYPES or tuple(tensor.shape) != entry.shape:
            continue
        stored = tensor.to(DTYPES[entry.dtype]).contiguous().cpu()
        left -= stored.nbytes
        if left < 0 and compared:
            return
        if tensor_digest(stored.view(-1).view(torch.uint8).numpy().data) != entry.sha256:
            raise AttachError(
                f"{name}: the model's values are not those of the base that the delta was made from ({base.name}, root "
                f"{base.root[:12]}); accept_base takes them all the same"
            )
        compared += 1
    if base.tensors and not compared:
        name, entry = next(iter(base.tensors.items()))
        raise AttachError(
            f"{name}: the model has no tensor of this name and shape {list(entry.shape)}, nor any other one of the "
            f"base that the delta was made from ({base.name}, root {base.root[:12]}); accept_base takes it all the same"
        )
