# SPDX-License-Identifier: Apache-2.0
"""Device memory, pinned memory, streams, events and graphs through cuda-python; nothing here knows of engines."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from deltaweave.runtime_plugin.trt.errors import EngineError
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "ALIGNMENT",
    "DeviceMemory",
    "Event",
    "Graph",
    "PinnedMemory",
    "Stream",
    "compute_capability",
    "free_bytes",
]

ALIGNMENT = 256


def _runtime() -> Any:
    """The CUDA runtime's bindings, imported when first needed: building an engine ahead of time needs none."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError("cuda-python is not installed; pip install 'deltaweave[tensorrt]'") from error
    return runtime


def _call(name: str, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime and gives its result.

    Raises:
        EngineError: it failed.
    """
    runtime = _runtime()
    status, *results = getattr(runtime, name)(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        reason = runtime.cudaGetErrorString(status)[1]
        raise EngineError(f"{name}: {reason.decode() if reason else status}")
    return results[0] if len(results) == 1 else tuple(results)


def compute_capability() -> str:
    """The current GPU's, as "9.0".

    Raises:
        EngineError: there is no GPU, or no driver.
    """
    attribute = _runtime().cudaDeviceAttr
    try:
        device = _call("cudaGetDevice")
    except EngineError as error:
        raise EngineError(f"an engine needs an NVIDIA GPU ({error})") from error
    major = _call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, device)
    minor = _call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, device)
    return f"{major}.{minor}"


def free_bytes() -> int:
    """Device memory that nobody has."""
    return int(_call("cudaMemGetInfo")[0])


class DeviceMemory:
    """Bytes on the device, zeros at first, freed with the object."""

    def __init__(self, size: int) -> None:
        """Takes `size` bytes and waits for the zeros; addresses of CUDA's allocator are multiples of 256."""
        self.size = size
        self.address = int(_call("cudaMalloc", max(size, ALIGNMENT)))
        self._free = weakref.finalize(self, _quiet, "cudaFree", self.address)
        _call("cudaMemset", self.address, 0, max(size, ALIGNMENT))
        # The memset is in the default stream, for which streams here do not wait: it could clear what they write.
        _call("cudaStreamSynchronize", 0)

    def free(self) -> None:
        """Gives the bytes back now."""
        self._free()


class PinnedMemory:
    """An array in host memory that copies run from and to beside other work."""

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        """Zeros of a shape."""
        count = int(np.prod(shape, dtype=np.int64))
        size = max(count * np.dtype(dtype).itemsize, 1)
        self.address = int(_call("cudaMallocHost", size))
        self._free = weakref.finalize(self, _quiet, "cudaFreeHost", self.address)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        self.array: NDArray[Any] = raw[: count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        self.array[...] = 0

    def free(self) -> None:
        """Gives the bytes back now; `array` must not be used afterwards."""
        self._free()


class Event:
    """A point in a stream."""

    def __init__(self, stream: Stream) -> None:
        """Marks what the stream has got so far."""
        flags = _runtime().cudaEventDisableTiming
        self._handle = _call("cudaEventCreateWithFlags", flags)
        weakref.finalize(self, _quiet, "cudaEventDestroy", self._handle)
        _call("cudaEventRecord", self._handle, stream.handle)

    def done(self) -> bool:
        """Whether the device has passed it."""
        runtime = _runtime()
        status = runtime.cudaEventQuery(self._handle)[0]
        if status == runtime.cudaError_t.cudaErrorNotReady:
            return False
        if status != runtime.cudaError_t.cudaSuccess:
            raise EngineError(f"cudaEventQuery: {status.name}")
        return True

    def wait(self) -> None:
        """Waits on the host."""
        _call("cudaEventSynchronize", self._handle)

    def order(self, stream: Stream) -> None:
        """Lets the stream wait, not the host."""
        _call("cudaStreamWaitEvent", stream.handle, self._handle, 0)


class Stream:
    """A stream of its own, not the default one."""

    def __init__(self) -> None:
        """Creates it."""
        self._raw = _call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)
        self.handle = int(self._raw)
        weakref.finalize(self, _quiet, "cudaStreamDestroy", self._raw)

    def upload(self, device: int, host: int, size: int) -> None:
        """Queues a copy to the device."""
        _call("cudaMemcpyAsync", device, host, size, _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice, self.handle)

    def download(self, host: int, device: int, size: int) -> None:
        """Queues a copy from the device."""
        _call("cudaMemcpyAsync", host, device, size, _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost, self.handle)

    def upload_rows(self, device: int, device_pitch: int, host: int, width: int, height: int) -> None:
        """Queues a copy of `height` packed rows of `width` bytes to rows that lie `device_pitch` apart."""
        kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        _call("cudaMemcpy2DAsync", device, device_pitch, host, width, width, height, kind, self.handle)

    def clear_rows(self, device: int, device_pitch: int, width: int, height: int) -> None:
        """Queues zeros for rows that lie `device_pitch` apart."""
        _call("cudaMemset2DAsync", device, device_pitch, 0, width, height, self.handle)

    def synchronize(self) -> None:
        """Waits until the stream is empty."""
        _call("cudaStreamSynchronize", self.handle)


class Graph:
    """Work of a stream, captured once and replayed."""

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        """Captures what `work` queues; it is not run.

        Raises:
            EngineError: the work failed, or cannot be captured.
        """
        mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", stream.handle, mode)
        try:
            work()
        except BaseException:
            _quiet("cudaStreamEndCapture", stream.handle)
            raise
        graph = _call("cudaStreamEndCapture", stream.handle)
        self._handle = _call("cudaGraphInstantiate", graph, 0)
        _call("cudaGraphDestroy", graph)
        self._destroy = weakref.finalize(self, _quiet, "cudaGraphExecDestroy", self._handle)

    def launch(self, stream: Stream) -> None:
        """Queues a replay."""
        _call("cudaGraphLaunch", self._handle, stream.handle)

    def destroy(self) -> None:
        """Gives it up now."""
        self._destroy()


def _quiet(name: str, *arguments: Any) -> None:
    """For clean-up, where a failure has no one to go to."""
    getattr(_runtime(), name)(*arguments)
