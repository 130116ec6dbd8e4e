# SPDX-License-Identifier: Apache-2.0
"""Embedding rows of many tenants on the GPU against float64, alone and tied to lm_head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from deltaweave.runtime_plugin.library import Embedding, Parameter, ParameterKind
from device_arena import Step
from gpu_checks import DTYPES, POISON, Poisoned, as_dtype, assert_close, make_arena
from table_records import RandomDense, RandomRows, Shared, draw_tables

pytestmark = pytest.mark.gpu


@dataclass
class Table:
    """Sizes of one case."""

    features: int = 512
    base_rows: int = 300
    rows: int = 320  # the most that a tenant may bring
    in_offset: int = 0
    group_size: int | None = 128
    shift: int = 8  # of y within its wider tensor


TABLES = {
    "usual": Table(),
    "odd": Table(features=331, base_rows=77, rows=100),
    "short": Table(features=40, base_rows=21, rows=21),
    "shard": Table(features=200, in_offset=56),
    "odd shard": Table(features=131, in_offset=37),
    "one group": Table(group_size=None),
    "wide groups": Table(features=700, group_size=384),
    "misaligned": Table(shift=3),
}


@pytest.mark.parametrize("by_address", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLES)
def test_embed(gpu_library, name, dtype, by_address):
    """Forty ids in every slot, first and last rows, ids that the base or nobody has, slots that do not exist."""
    case, rng, kind = TABLES[name], np.random.default_rng(11), getattr(torch, dtype)
    records = draw_tables(rng, case.features, case.base_rows, case.rows, case.group_size, case.in_offset)
    parameter = Parameter(ParameterKind.EMBEDDING, case.features, case.rows, case.in_offset, 0)
    arena = make_arena(gpu_library, [parameter], [*({0: record} for record in records), {}])
    table = torch.from_numpy(rng.standard_normal((case.base_rows, case.features)) * 0.1).to(kind).cuda()
    slots = torch.arange(-1, len(records) + 2, dtype=torch.int32).repeat_interleave(40)
    slots[:5] = torch.tensor([99, -7, 1 << 30, -(1 << 31), len(records) + 2])
    ids = torch.from_numpy(rng.integers(0, case.rows, len(slots)))
    ids[::40], ids[1::40] = 0, case.rows - 1
    ids[2::40], ids[3::40], ids[4::40] = case.base_rows, -1, 1 << 40
    slots, ids = slots.cuda(), ids.cuda()
    y = Poisoned((len(slots), case.features), kind, case.shift)
    embedding = Embedding(
        arena.batch(slots, kind, by_address=by_address), 0, case.base_rows, case.features, case.in_offset,
        ids.data_ptr(), table.data_ptr(), table.stride(0), y.inner.data_ptr(), y.wide.stride(0),
    )  # fmt: skip
    gpu_library.embed(embedding)
    got = y.numpy()
    base = np.zeros((case.rows, case.features))
    base[: case.base_rows] = table.double().cpu().numpy()
    tuned = {slot: record.change(base) for slot, record in enumerate(records)}
    for t, (slot, token) in enumerate(zip(slots.tolist(), ids.tolist(), strict=True)):
        inside = 0 <= token < case.rows
        row = tuned.get(slot, base)[token] if inside else np.zeros(case.features)
        note = f"{name} token {t} slot {slot} id {token}"
        if inside and slot in tuned and isinstance(records[slot], RandomDense):
            levels = 2.0**-11 * np.abs(row - base[token])  # a codebook's levels are fp16 in the arena
            slack = float(torch.finfo(kind).eps) * np.abs(row) + levels + 1e-6
            assert (np.abs(got[t] - row) <= slack).all(), note
        else:
            assert np.array_equal(got[t], as_dtype(row, kind)), note


class TiedModel:
    """Embedding, base product and lm_head over tenants whose two tables are one record."""

    rows, features, tokens = 100, 256, 5

    def __init__(self, library, rng, records):
        parameters = [Parameter(kind, self.features, self.rows, 0, 0) for kind in (1, 0)]
        self.library, self.records = library, dict(enumerate(records))
        self.arena = make_arena(library, parameters, [{0: record, 1: Shared(0)} for record in records])
        self.table = torch.from_numpy(rng.standard_normal((self.rows, self.features)) * 0.1).half().cuda()
        self.slots = torch.tensor([0, 1, -1, 0, 2], dtype=torch.int32, device="cuda")
        self.ids = torch.tensor([3, 99, 5, 42, 7], device="cuda")
        self.hidden = torch.full((self.tokens, self.features), POISON, dtype=torch.half, device="cuda")
        self.logits = torch.full((self.tokens, self.rows), POISON, dtype=torch.half, device="cuda")
        self.step = Step(self.arena, self.slots)
        self.gemm, self.workspace = self.step.product(self.hidden, [(1, self.logits)])
        self.embedding = Embedding(
            self.arena.batch(self.slots, torch.half), 0, self.rows, self.features, 0, self.ids.data_ptr(),
            self.table.data_ptr(), self.features, self.hidden.data_ptr(), self.features,
        )  # fmt: skip

    def run(self):
        stream = torch.cuda.current_stream().cuda_stream
        self.step.make_plan()
        self.library.embed(self.embedding, stream)
        torch.mm(self.hidden, self.table.T, out=self.logits)
        self.library.dense_gemm(self.gemm, stream)

    def check(self):
        torch.cuda.synchronize()
        base = self.table.double().cpu().numpy()
        for t, slot in enumerate(self.slots.tolist()):
            tuned = self.records[slot].change(base) if slot in self.records else base
            x = as_dtype(tuned[self.ids[t].item()], torch.half)
            assert_close(self.logits[t].double().cpu().numpy(), tuned @ x, "float16", f"token {t} slot {slot}")


def test_tied_tables_share_one_record(gpu_library):
    """The embedding's record serves lm_head, in a graph too, and after another tenant has taken its slot."""
    rng = np.random.default_rng(8)
    rows, features = TiedModel.rows, TiedModel.features
    records = [RandomDense.draw(rng, rows, features), RandomRows.draw(rng, 30, rows, features)]
    model = TiedModel(gpu_library, rng, records)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.run()
    torch.cuda.current_stream().wait_stream(side)
    model.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.run()
    model.arena.evict(0)
    model.records[0] = RandomRows.draw(rng, rows, rows, features)
    assert model.arena.add({0: model.records[0], 1: Shared(0)}) == 0
    model.slots.copy_(torch.tensor([1, 0, 0, -1, 77], dtype=torch.int32))
    model.hidden.fill_(POISON)
    graph.replay()
    model.check()
