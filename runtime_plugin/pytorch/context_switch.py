# SPDX-License-Identifier: Apache-2.0
"""Keeps the gaps between a step's kernels short: the GPU is made to change contexts when streams have been changed.

Measured on an H200 (cuda/NOTES.md, section 19): once a stream's kernels have been left for those of another and come
back to sixteen times, every kernel that waits for the one before it begins 0.4 us later, also in CUDA graphs, where a
decode step of Llama-2-7B takes 0.15 ms longer for it. Copies do not count, nor do kernels of one stream. It lasts until
the GPU has run something in another context, of whatever process. Uploads, which repack in streams of their own, bring
it about soon; so do captures.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from deltaweave.runtime_plugin.pytorch.upload import Ready

__all__ = ["QuietSwitch", "context_switch", "quiet_switch"]

# A switch takes 0.36 ms of a step, so one comes when nothing was uploaded for so long,
QUIET_SECONDS = 0.05
# and now and then, for what changes streams without being known here.
PERIOD_SECONDS = 5.0
HOPPER = 9  # compute capability
NOTHING = b".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"


class QuietSwitch:
    """Switches contexts between steps, once the device has been left alone by everything else."""

    def __init__(self, switch: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`switch`: queues a switch; the host does not wait. `clock`: seconds."""
        self._switch, self._clock = switch, clock
        self._upload: Ready | None = None
        self._due = clock() + QUIET_SECONDS

    def disturb(self, upload: Ready | None = None) -> None:
        """Streams have been changed, and are until an upload is done; uploads end in the order in which they come."""
        if upload is not None:
            self._upload = upload
        self._due = self._clock() + QUIET_SECONDS

    def switch_if_quiet(self) -> None:
        """A step is about to begin."""
        if self._upload is not None and not self._upload.done():
            self.disturb()
            return
        self._upload = None
        if self._clock() >= self._due:
            self._due = self._clock() + PERIOD_SECONDS
            self._switch()


def quiet_switch(device: torch.device, *, wanted: bool) -> QuietSwitch:
    """That of an arena's device: it does nothing on a CPU, on a GPU whose contexts stay, or where it is not wanted."""
    return QuietSwitch(context_switch(device.index) if wanted and device.type == "cuda" else _nothing)


@cache
def context_switch(device: int) -> Callable[[], None]:
    """What makes a GPU switch contexts: runs an empty kernel in another one, which takes 0.5 GiB of it from now on.

    On GPUs other than Hopper's, where nobody has measured what that gains, it does nothing. Nor does it where there
    can be no such context, or as soon as it fails: a RuntimeWarning says so once, and steps go on.
    """
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return _nothing
    try:
        return _Switch(device)
    except Exception as error:  # no bindings, ones of another form, a driver that refuses: it is not needed
        _warn(error)
        return _nothing


def _nothing() -> None:
    """Leaves contexts as they are."""


def _warn(error: Exception) -> None:
    warnings.warn(f"no second CUDA context ({error}): steps take up to 4 % longer", RuntimeWarning, stacklevel=3)


class _Switch:
    def __init__(self, device: int) -> None:
        from cuda.bindings import driver

        self._driver, self._works = driver, True
        self._call("cuInit", 0)
        self._context = self._call("cuCtxCreate", None, 0, self._call("cuDeviceGet", device))
        try:
            module = self._call("cuModuleLoadData", NOTHING)
            self._kernel = self._call("cuModuleGetFunction", module, b"nothing")
        except BaseException:
            self._call("cuCtxDestroy", self._context)  # it is the thread's no longer then, either
            raise
        self._call("cuCtxPopCurrent")

    def __call__(self) -> None:
        if not self._works:
            return
        try:
            self._call("cuCtxPushCurrent", self._context)
            try:
                self._call("cuLaunchKernel", self._kernel, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
            finally:
                self._call("cuCtxPopCurrent")
        except RuntimeError as error:
            self._works = False
            _warn(error)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {status.name}")
        return results[0] if results else None
