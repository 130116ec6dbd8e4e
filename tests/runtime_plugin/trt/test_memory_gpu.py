# SPDX-License-Identifier: Apache-2.0
"""Device memory of the engine host, on a GPU."""

from __future__ import annotations

import pytest
import torch
from deltaweave.runtime_plugin.trt.memory import DeviceMemory, PinnedMemory, Stream

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


def test_zeros_do_not_come_after_what_is_written():
    """Clearing gigabytes takes longer than the queueing of a copy in another stream."""
    stream, source, found = Stream(), PinnedMemory((1 << 20,), "uint8"), PinnedMemory((1 << 20,), "uint8")
    source.array[:] = 7
    memory = DeviceMemory(4 << 30)
    last = memory.address + memory.size - source.array.nbytes
    stream.upload(last, source.address, source.array.nbytes)
    torch.cuda.synchronize()
    stream.download(found.address, last, found.array.nbytes)
    stream.synchronize()
    assert (found.array == 7).all()
