# SPDX-License-Identifier: Apache-2.0
"""Deltas beside the base's product that they belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["SecondStream"]


class SecondStream:
    """A GPU's stream beside the current one, for CUDA graphs.

    Outside of a graph all is done in turn: the host would take longer for two streams than the GPU for one.
    """

    def __init__(self, device: torch.device) -> None:
        """Of a higher priority than others: measured better where few deltas run beside a large product."""
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def beside(self, base: Callable[[], object], deltas: Callable[[], object]) -> None:
        """Both at the same time, the deltas on this stream; the current one waits for both."""
        if self._stream is None or not torch.cuda.is_current_stream_capturing():
            base()
            deltas()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        base()
        with torch.cuda.stream(self._stream):
            deltas()
        current.wait_stream(self._stream)
