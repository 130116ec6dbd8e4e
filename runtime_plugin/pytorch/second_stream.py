# SPDX-License-Identifier: Apache-2.0
"""Deltas beside the base's product that they belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["MOST_BESIDE", "SecondStream"]

# The most tokens of a step whose deltas are computed beside the base's products: with more the two hardly overlap.
MOST_BESIDE = 32
# Tokens whose deltas are no more urgent than the base's product, by measurement (cuda/NOTES.md): their kernels leave
# room beside it, and are long. Fewer, and more, are faster with a higher priority than the current stream has.
EQUAL_PRIORITY = range(8, 16)


class SecondStream:
    """A GPU's stream beside the current one, for CUDA graphs.

    Outside of a graph all is done in turn: the host would take longer for two streams than the GPU for one.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing for a CPU."""
        self._streams = (
            [torch.cuda.Stream(device, priority=-urgent) for urgent in (0, 1)] if device.type == "cuda" else []
        )

    def beside(self, tokens: int, base: Callable[[], object], deltas: Callable[[], object]) -> None:
        """The base's product and deltas of so many tokens at the same time; the current stream waits for both."""
        if not self._streams or not torch.cuda.is_current_stream_capturing():
            base()
            deltas()
            return
        stream = self._streams[tokens not in EQUAL_PRIORITY]
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        base()
        with torch.cuda.stream(stream):
            deltas()
        current.wait_stream(stream)
