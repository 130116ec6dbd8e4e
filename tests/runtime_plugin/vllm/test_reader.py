# SPDX-License-Identifier: Apache-2.0
"""Reading tenants beside the steps, with a reader that waits until it is told."""

import threading

import pytest
from deltaweave.formats import FormatError
from deltaweave.runtime_plugin.pytorch import ArenaError
from deltaweave.runtime_plugin.vllm.reader import Adapter, TenantReader

MATH, CODE = Adapter(1, "math", "/tenants/math"), Adapter(2, "code", "/tenants/code")
WAIT = 10


class Disk:
    """Gives an adapter's name as its tenant, once it is allowed to; files may be missing."""

    def __init__(self):
        self.allowed, self.read, self.missing = threading.Event(), [], set()

    def __call__(self, adapter):
        assert self.allowed.wait(WAIT)
        self.read.append(adapter.name)
        if adapter.name in self.missing:
            raise FormatError(f"{adapter.path}: not readable")
        return f"held {adapter.name}"


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.allowed.set()


def test_nobody_waits_but_who_wants_to(disk):
    reader = TenantReader(disk)
    reading = reader.begin(MATH)
    assert reader.begin(MATH) is reading and not reading.done() and reader.finished() == []
    disk.allowed.set()
    tenant, seconds = reader.wait(MATH)
    assert tenant == "held math" and seconds >= 0 and disk.read == ["math"]
    assert reader.wait(MATH)[0] is tenant and reader.finished() == [MATH]
    assert reader.drop(MATH.id) and reader.finished() == []
    reader.begin(MATH).result(WAIT)
    assert disk.read == ["math", "math"] and reader.finished() == [MATH]


def test_what_is_not_wanted_any_more(disk):
    reader = TenantReader(disk)
    disk.allowed.set()
    reader.begin(MATH).result(WAIT)
    assert reader.drop(MATH.id) and not reader.drop(MATH.id) and reader.finished() == []


def test_a_failure_is_told_to_who_asks_and_tried_again(disk):
    reader = TenantReader(disk)
    disk.missing.add("math")
    disk.allowed.set()
    with pytest.raises(FormatError, match="math: not readable"):
        reader.begin(MATH).result(WAIT)
    assert reader.begin(CODE).result(WAIT) == "held code" and reader.finished() == [CODE]
    with pytest.raises(FormatError, match="math: not readable"):
        reader.wait(MATH)
    disk.missing.clear()
    assert reader.wait(MATH)[0] == "held math"


def test_an_id_stands_for_one_tenant(disk):
    reader = TenantReader(disk)
    reader.begin(MATH)
    with pytest.raises(ArenaError, match="adapter 1 is 'math' and was to be 'code' of /tenants/code too"):
        reader.begin(Adapter(1, "code", CODE.path))
    disk.allowed.set()
    assert reader.wait(MATH)[0] == "held math"
