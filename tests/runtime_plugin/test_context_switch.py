# SPDX-License-Identifier: Apache-2.0
"""When the device is made to switch contexts."""

import sys

import pytest
import torch
from deltaweave.runtime_plugin.pytorch.context_switch import (
    PERIOD_SECONDS,
    QUIET_SECONDS,
    QuietSwitch,
    context_switch,
)


class Upload:
    """One that ends when it is told to."""

    ended = False

    def done(self):
        return self.ended


class Device:
    """Counts switches; `at` is the time."""

    def __init__(self):
        self.at, self.switches = 100.0, 0
        self.quiet = QuietSwitch(self._switch, lambda: self.at)

    def _switch(self):
        self.switches += 1

    def steps(self, seconds):
        """A step every ten milliseconds; the switches that they began with."""
        before, end = self.switches, self.at + seconds
        while self.at < end:
            self.at += 0.01
            self.quiet.settle()
        return self.switches - before


def test_switches_once_after_the_start_and_then_now_and_then():
    device = Device()
    assert device.steps(QUIET_SECONDS / 2) == 0
    assert device.steps(QUIET_SECONDS) == 1
    assert device.steps(PERIOD_SECONDS - 0.1) == 0
    assert device.steps(10 * PERIOD_SECONDS) == 10


def test_an_upload_is_waited_for_and_then_some():
    device, upload = Device(), Upload()
    device.steps(1.0)
    device.quiet.disturb(upload)
    device.quiet.disturb()
    assert device.steps(3 * PERIOD_SECONDS) == 0
    upload.ended = True
    assert device.steps(QUIET_SECONDS / 2) == 0
    assert device.steps(QUIET_SECONDS) == 1
    assert device.steps(PERIOD_SECONDS / 2) == 0


def test_uploads_one_after_another_are_followed_by_one_switch():
    device, found = Device(), 0
    device.steps(1.0)
    for _ in range(100):
        upload = Upload()
        device.quiet.disturb(upload)
        upload.ended = True
        found += device.steps(0.02)
    assert found == 0
    assert device.steps(1.0) == 1


@pytest.fixture
def capability(monkeypatch):
    """Of the GPU that is taken to be there; may be changed."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(found))
    context_switch.cache_clear()
    yield found
    context_switch.cache_clear()


def test_gpus_that_were_not_measured_are_left_alone(capability, monkeypatch, recwarn):
    capability[:] = 8, 9
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    context_switch(0)()
    assert not recwarn


def test_without_the_driver_s_bindings_there_is_a_warning_and_no_switch(capability, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.warns(RuntimeWarning, match="no second CUDA context"):
        context_switch(0)()


def test_a_driver_that_refuses_is_said_to(capability, monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult.CUDA_SUCCESS,))
    monkeypatch.setattr(driver, "cuDeviceGet", lambda device: (driver.CUresult.CUDA_SUCCESS, 0))
    monkeypatch.setattr(driver, "cuCtxCreate", lambda *_: (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None))
    with pytest.warns(RuntimeWarning, match="cuCtxCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        context_switch(0)()
