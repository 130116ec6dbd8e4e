# SPDX-License-Identifier: Apache-2.0
"""Deltas beside the base's product that they belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["SecondStream"]


class SecondStream:
    """A device's stream beside the current one; on a CPU, one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Of a higher priority than others: measured better where few deltas run beside a large product."""
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def beside(self, base: Callable[[], object], deltas: Callable[[], object]) -> None:
        """Both at the same time, the deltas on this stream; the current one waits for both."""
        if self._stream is None:
            base()
            deltas()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        base()
        with torch.cuda.stream(self._stream):
            deltas()
        current.wait_stream(self._stream)
