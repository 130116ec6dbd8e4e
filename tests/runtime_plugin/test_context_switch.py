# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  # the driver names its functions so
"""When the device is made to switch contexts, and that steps go on where it cannot be."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from deltaweave.runtime_plugin.pytorch import context_switch as module
from deltaweave.runtime_plugin.pytorch.context_switch import PERIOD_SECONDS, QUIET_SECONDS, QuietSwitch


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
            self.quiet.switch_if_quiet()
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


class Driver(ModuleType):
    """cuda.bindings.driver as far as it is used, with its signatures; the functions in `refused` fail."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))

    def __init__(self):
        super().__init__("cuda.bindings.driver")
        self.refused, self.contexts, self.current, self.launched = set(), set(), [], 0

    def _answer(self, name, *results):
        if name in self.refused:
            return (SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"), *(None for _ in results))
        return (self.CUresult.CUDA_SUCCESS, *results)

    def cuInit(self, flags):
        return self._answer("cuInit")

    def cuDeviceGet(self, ordinal):
        return self._answer("cuDeviceGet", ordinal)

    def cuCtxCreate(self, parameters, flags, device):
        if "cuCtxCreate" not in self.refused:
            self.contexts.add("second")
            self.current.append("second")
        return self._answer("cuCtxCreate", "second")

    def cuCtxDestroy(self, context):
        self.contexts.remove(context)
        self.current.remove(context)
        return self._answer("cuCtxDestroy")

    def cuCtxPushCurrent(self, context):
        self.current.append(context)
        return self._answer("cuCtxPushCurrent")

    def cuCtxPopCurrent(self):
        return self._answer("cuCtxPopCurrent", self.current.pop())

    def cuModuleLoadData(self, image):
        return self._answer("cuModuleLoadData", "module")

    def cuModuleGetFunction(self, module, name):
        return self._answer("cuModuleGetFunction", name)

    def cuLaunchKernel(self, kernel, *sizes_stream_arguments):
        assert self.current == ["second"] and len(sizes_stream_arguments) == 10
        self.launched += "cuLaunchKernel" not in self.refused
        return self._answer("cuLaunchKernel")


@pytest.fixture
def driver(monkeypatch):
    """A Hopper GPU's; `context_switch` has made nothing yet."""
    found = Driver()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = found
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "context_switch", module.cache(module.context_switch.__wrapped__))
    return found


def test_an_empty_kernel_runs_in_one_second_context(driver):
    for _ in range(3):
        module.context_switch(0)()
    assert driver.launched == 3
    assert driver.contexts == {"second"} and not driver.current


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cuda:0", False), ("cuda:0", True)])
def test_an_arena_switches_on_a_gpu_where_it_is_wanted(driver, monkeypatch, device, wanted):
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    module.quiet_switch(torch.device(device), wanted=wanted).switch_if_quiet()
    assert driver.launched == len(driver.contexts) == (wanted and device != "cpu")


def test_gpus_that_were_not_measured_are_left_alone(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    module.context_switch(0)()
    module.quiet_switch(torch.device("cuda", 0), wanted=True)
    assert not driver.launched and not driver.contexts


@pytest.mark.parametrize("refused", ["cuInit", "cuDeviceGet", "cuCtxCreate", "cuModuleLoadData", "cuModuleGetFunction"])
def test_where_there_can_be_no_such_context_a_warning_says_so(driver, refused):
    driver.refused.add(refused)
    with pytest.warns(RuntimeWarning, match=rf"no second CUDA context \({refused}: CUDA_ERROR_OUT_OF_MEMORY\)"):
        switch = module.context_switch(0)
    switch()
    assert not driver.launched and not driver.contexts and not driver.current


def test_bindings_of_another_form_or_none_are_no_error(driver, monkeypatch):
    monkeypatch.setattr(driver, "cuCtxCreate", lambda flags, device: None)
    with pytest.warns(RuntimeWarning, match="no second CUDA context"):
        module.context_switch(0)()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.warns(RuntimeWarning, match="no second CUDA context"):
        module.context_switch(1)()


def test_a_switch_that_fails_is_the_last_one(driver, recwarn):
    switch = module.context_switch(0)
    driver.refused.add("cuLaunchKernel")
    switch()
    assert "cuLaunchKernel" in str(recwarn.pop(RuntimeWarning).message)
    driver.refused.clear()
    switch()
    assert not driver.launched and not driver.current and not recwarn
