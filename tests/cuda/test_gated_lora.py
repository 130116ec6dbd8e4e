# SPDX-License-Identifier: Apache-2.0
"""Gate and LoRAs of many fusions on the GPU against float64, beside deltas in one batch, and in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from deltaweave.formats import LoraMatrix
from deltaweave.runtime_plugin.library import Gate, Library, Parameter, ParameterKind, Record
from deltaweave.runtime_plugin.records import LoraStack, Mix
from device_arena import DeviceArena, Step
from factored_records import RandomBand, RandomRecord
from fusion_records import expected_term, expected_weights, random_loras, random_mix
from gpu_checks import DTYPES, POISON, Poisoned, assert_close

pytestmark = pytest.mark.gpu

DENSE = 128  # tokens of a slot from which prefill gives it tiles of its own


@dataclass(frozen=True)
class Experts:
    """The LoRAs of one linear layer as the arena takes them."""

    stack: LoraStack

    def shape(self, parameter: int) -> Record:
        return Record.lora(parameter, self.stack.ranks)

    def tensors(self) -> dict[str, bytes]:
        def joined(parts: Sequence[np.ndarray]) -> bytes:
            return b"".join(raw.tobytes() + bytes(-raw.nbytes % 16) for raw in parts)

        return {
            "v_codes": joined(self.stack.a),
            "u_codes": joined(self.stack.b),
            "sigma": self.stack.sigma.tobytes(),
        }


@dataclass(frozen=True)
class Gating:
    """A gate as the arena takes it."""

    mix: Mix

    def shape(self, parameter: int) -> Record:
        return Record.mix(parameter, len(self.mix.bias), self.mix.weight is not None)

    def tensors(self) -> dict[str, bytes]:
        weight = {} if self.mix.weight is None else {"values": self.mix.weight.tobytes()}
        return {"sigma": self.mix.numbers().tobytes()} | weight


@dataclass(frozen=True)
class Case:
    """One call: what every fusion has, by slot; its ranks a layer, 0 for an expert that leaves it alone."""

    slots: tuple[int, ...] = (0, 1, -1, 2, 0, 1)
    in_features: int = 512
    outs: tuple[int, ...] = (384,)
    ranks: tuple[tuple[int, ...], ...] = ((64, 64), (8,), (5, 0, 33, 1))
    dtype: str = "float16"
    chunk: int = 0
    x_gap: int = 0  # elements between rows of x
    lora_dtype: str = "BF16"


class Setup:
    """Fusions on the GPU: gate first, then the layers; slot 0 lacks the last of several layers."""

    def __init__(self, library: Library, case: Case, seed: int = 0) -> None:
        self.library, self.case = library, case
        rng = np.random.default_rng(seed)
        linears = [Parameter(ParameterKind.LINEAR, case.in_features, out, 0, 0) for out in case.outs]
        parameters = [Parameter(ParameterKind.GATE, case.in_features, 1, 0, 0), *linears]
        most = max(map(sum, case.ranks))
        self.arena = DeviceArena(library, parameters, slots=len(case.ranks) + 2, size=64 << 20, max_rank=max(most, 128))
        self.mixes: dict[int, Mix] = {}
        self.loras: dict[int, list[list[LoraMatrix | None]]] = {}
        for slot, ranks in enumerate(case.ranks):
            self.draw(rng, slot, ranks)
        kind = getattr(torch, case.dtype)
        self.slots = torch.tensor(case.slots, dtype=torch.int32)
        tokens = len(case.slots)
        self.x = torch.from_numpy(rng.standard_normal((tokens, case.in_features + case.x_gap))).to(kind).cuda()
        self.x = self.x[:, : case.in_features]
        self.block = torch.from_numpy(rng.standard_normal((tokens, case.in_features))).to(kind).cuda()
        self.weights = torch.full((tokens, 8), POISON, device="cuda")

    def draw(self, rng: np.random.Generator, slot: int, ranks: Sequence[int]) -> None:
        """A fusion takes the next slot, which must be `slot`."""
        case = self.case
        self.mixes[slot] = random_mix(rng, len(ranks), case.in_features, gated=slot % 3 != 1)
        layers = [random_loras(rng, (out, case.in_features), ranks, case.lora_dtype) for out in case.outs]
        if slot == 0 and len(layers) > 1:
            layers[-1] = []
        self.loras[slot] = layers
        stacks = {
            1 + index: Experts(LoraStack.of((case.outs[index], case.in_features), experts))
            for index, experts in enumerate(layers)
            if experts
        }
        assert self.arena.add({0: Gating(self.mixes[slot]), **stacks}) == slot

    def gate(self, slots: torch.Tensor) -> None:
        """Weights of all tokens; `slots` int32 on the device."""
        gate = Gate(
            self.arena.batch(slots, self.x.dtype), 0, self.case.in_features, self.block.data_ptr(),
            self.block.stride(0), self.weights.data_ptr(), 8,
        )  # fmt: skip
        self.library.gate_weights(gate, torch.cuda.current_stream().cuda_stream)

    def run(self, slots: torch.Tensor | None = None) -> list[np.ndarray]:
        """What the layers gain, each y within a wider tensor whose margin must survive."""
        step = Step(self.arena, self.slots if slots is None else slots, chunk=self.case.chunk)
        self.gate(step.slots)
        ys = [Poisoned((len(self.x), out), self.x.dtype) for out in self.case.outs]
        for y in ys:
            y.inner.zero_()
        step.make_plan()
        gemm, workspace = step.product(self.x, [(1 + index, y.inner) for index, y in enumerate(ys)])
        gemm.weights, gemm.weights_stride = self.weights.data_ptr(), 8
        self.library.gated_lora(gemm, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        assert workspace.numel() == gemm.workspace_bytes
        return [y.numpy() for y in ys]

    def expected_weights(self) -> np.ndarray:
        """[tokens, 8]"""
        block = self.block.double().cpu().numpy()
        slots = self.slots.tolist()
        return np.stack([expected_weights(x, self.mixes.get(slot)) for x, slot in zip(block, slots, strict=True)])

    def expected(self, index: int) -> np.ndarray:
        """[tokens, out]"""
        x, weights = self.x.double().cpu().numpy(), self.expected_weights()
        y = np.zeros((len(x), self.case.outs[index]))
        for token, slot in enumerate(self.slots.tolist()):
            y[token] = expected_term(x[token], weights[token], self.loras.get(slot, [[]] * len(self.case.outs))[index])
        return y


CASES = {
    "mixed": Case(),
    "one token": Case(slots=(0,)),
    "one expert": Case(ranks=((16,), (1,), (7,))),
    "eight experts": Case(ranks=((4,) * 8, (1, 2, 3, 4, 5, 6, 7, 8), (0, 0, 0, 0, 0, 0, 0, 9))),
    "leading and trailing zeros": Case(ranks=((0, 3, 0), (0, 0, 17), (40, 0, 0))),
    "rank 256": Case(ranks=((64, 256), (256, 3), (255,))),
    "stacked": Case(outs=(512, 128, 128), in_features=1024, slots=(2, 0, 1, 0, 2, 1, -1, 0, 0, 0, 0)),
    "long input": Case(in_features=11008, outs=(256,)),
    "no multiples": Case(in_features=331, outs=(77, 5)),
    "base alone": Case(slots=(-1, -1)),
    "outside the directory": Case(slots=(99, 0, -7, 3)),
    "many of one": Case(slots=(1,) * 40),
    "many fusions": Case(ranks=tuple((1 + i % 20, 16) for i in range(16)), slots=tuple(i % 16 for i in range(32))),
    "more units than a block looks at together": Case(slots=(0, 1, 2) * 620, outs=(128, 128, 256)),
    "misaligned x": Case(x_gap=3),
    "fp16 file": Case(lora_dtype="F16"),
    "fp32 file": Case(lora_dtype="F32"),
}


def check(library: Library, case: Case, note: str) -> None:
    setup = Setup(library, case)
    got = setup.run()
    assert np.allclose(setup.weights.double().cpu().numpy(), setup.expected_weights(), rtol=1e-4, atol=1e-5), note
    for index, y in enumerate(got):
        expected = setup.expected(index)
        assert_close(y, expected, case.dtype, f"{note} layer {index}")
        assert not y[~expected.any(axis=1)].any(), "a token without LoRAs gained something"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_decode(gpu_library, name, dtype):
    check(gpu_library, replace(CASES[name], dtype=dtype, chunk=8), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_prefill(gpu_library, name, dtype):
    """Slot 0 has so many tokens that it gets tiles of its own; the others keep their few."""
    case = CASES[name]
    slots = np.random.default_rng(2).permutation([0] * (DENSE + 5) + list(case.slots)).tolist()
    check(gpu_library, replace(case, dtype=dtype, chunk=128, slots=tuple(slots)), name)


@pytest.mark.parametrize("many", [0, DENSE], ids=["decode", "dense"])
def test_neighbours_leave_bits_alone(gpu_library, many):
    """Tokens of fusion 0 keep their bits when the others change fusion, and in a second run."""
    case = Case(slots=(0, 1, 0, 2, -1, 0, 1) + (0, 2) * many, chunk=128 if many else 8)
    setup = Setup(gpu_library, case)
    mine = np.array(case.slots) == 0
    before = setup.run()[0][mine]
    weights = setup.weights.clone()
    moved = torch.where(torch.from_numpy(mine), 0, 1).int()
    assert np.array_equal(before, setup.run(moved)[0][mine])
    rows = torch.from_numpy(mine).cuda()
    assert torch.equal(weights[rows], setup.weights[rows])


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_small_and_large_activations(gpu_library, factor):
    setup = Setup(gpu_library, Case(dtype="bfloat16"))
    setup.x.mul_(factor)
    assert_close(setup.run()[0], setup.expected(0), "bfloat16")


def test_deltas_and_fusions_leave_each_other_alone(gpu_library):
    """A slot with a factored record gains nothing from gated_lora, one with LoRAs nothing from delta_gemm."""
    setup = Setup(gpu_library, Case(slots=(3, 3, 0, 3)))
    record = RandomRecord.draw(np.random.default_rng(1), (384, 512), (RandomBand(3, 32), RandomBand(16, 9)))
    assert setup.arena.add({1: record}) == 3
    y = setup.run()[0]
    assert y[2].any() and not y[[0, 1, 3]].any()
    delta = torch.zeros((4, 384), device="cuda", dtype=setup.x.dtype)
    Step(setup.arena, setup.slots).run(setup.x, [(1, delta)])
    torch.cuda.synchronize()
    expected = record.apply(setup.x.double().cpu().numpy())
    expected[2] = 0
    assert_close(delta.double().cpu().numpy(), expected, "float16")


def test_graph_replay_follows_slots_and_fusions(gpu_library):
    """One captured graph serves other slots, and another fusion in a slot."""
    setup = Setup(gpu_library, Case(slots=(0, 1, 2, -1)))
    y = torch.zeros((4, 384), device="cuda", dtype=setup.x.dtype)
    step = Step(setup.arena, setup.slots)
    gemm, workspace = step.product(setup.x, [(1, y)])
    gemm.weights, gemm.weights_stride = setup.weights.data_ptr(), 8

    def work() -> None:
        setup.gate(step.slots)
        step.make_plan()
        gpu_library.gated_lora(gemm, torch.cuda.current_stream().cuda_stream)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    setup.arena.evict(1)
    setup.draw(np.random.default_rng(5), 1, (3, 40, 2, 9))
    setup.slots = torch.tensor([1, 2, -1, 1], dtype=torch.int32)
    step.slots.copy_(setup.slots)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_close(y.double().cpu().numpy(), setup.expected(0), "float16")
    assert workspace.numel() == gemm.workspace_bytes
