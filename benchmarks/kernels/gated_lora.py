# SPDX-License-Identifier: Apache-2.0
"""LoRA-Flow's gated fusion on Llama-2-7B's layers: our kernels, PEFT-style execution, vLLM's LoRA kernels (K5).

    RIVALS=... DELTAWEAVE_LIBRARY=build/sm90/cuda/libdeltaweave.so python benchmarks/kernels/gated_lora.py

A step is the linear layers of some decoder blocks with a gate and k LoRAs of rank 64 on each, in bf16: the median of
replays of one CUDA graph. The base is the same graph without fusions; in the ratio it counts as the faster of what it
took and its bytes at the copy rate. What runs once a step, whatever its depth, is left out: our plan, vLLM's metadata,
the rows of each fusion. Every contender is checked against float64 first; kernel launches a layer are counted from a
profile. README.md beside this says where vLLM's files come from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests"))

from deltaweave.runtime_plugin.library import Gate, Library, Parameter, ParameterKind, Record  # noqa: E402
from device_arena import DeviceArena, Step  # noqa: E402
from results_file import circumstances, write_result  # noqa: E402
from rivals.loading import RivalMissingError  # noqa: E402
from rivals.timing import copy_rate, graph_timing  # noqa: E402
from rivals.vllm_lora import vllm_ops  # noqa: E402

HIDDEN, INTERMEDIATE, LAYERS, RANK, SCALE = 4096, 11008, 32, 64, 0.25
DTYPE = torch.bfloat16
# Linear layers that share their input: (in_features, out_features of each).
GROUPS = [
    (HIDDEN, (HIDDEN, HIDDEN, HIDDEN)),
    (HIDDEN, (HIDDEN,)),
    (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    (INTERMEDIATE, (HIDDEN,)),
]
LINEARS = [(features, out) for features, outs in GROUPS for out in outs]


@dataclass(frozen=True)
class Case:
    """Tokens of a step, fusions among them in turn, experts of each, decoder blocks that are run."""

    tokens: int
    fusions: int
    experts: int
    layers: int

    @property
    def rank(self) -> int:
        """Of all experts together."""
        return self.experts * RANK


def normal(shape: Sequence[int], size: float) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * size).to(DTYPE)


class Model:
    """Weights, inputs and outputs of a case; every fusion and layer has the same values at addresses of its own."""

    def __init__(self, case: Case, base: Sequence[Sequence[torch.Tensor]]) -> None:
        self.case, self.base = case, base[: case.layers]
        self.a = [normal((case.rank, features), features**-0.5) for features, _ in LINEARS]
        self.b = [normal((out, case.rank), RANK**-0.5) for _, out in LINEARS]
        self.gate = normal((case.experts, HIDDEN), HIDDEN**-0.5)
        self.bias = torch.linspace(-0.5, 0.5, case.experts, device="cuda")
        self.block = normal((case.tokens, HIDDEN), 1)
        self.xs = [normal((case.tokens, features), 1) for features, _ in GROUPS]
        self.ys = [torch.zeros((case.tokens, sum(outs)), dtype=DTYPE, device="cuda") for _, outs in GROUPS]
        self.slots = torch.arange(case.tokens, device="cuda") % case.fusions

    def run_base(self, layer: int, group: int) -> None:
        torch.mm(self.xs[group], self.base[layer][group].T, out=self.ys[group])

    def error(self, fuse: Callable[[int], None]) -> float:
        """Of the last token in all linear layers, norm-wise."""
        for y in self.ys:
            y.zero_()
        fuse(0)
        block = self.block[-1].double()
        weights = torch.softmax(self.gate.double() @ block, dim=0) + self.bias.double()
        expected, linear = [], 0
        for x, (_, outs) in zip(self.xs, GROUPS, strict=True):
            for _ in outs:
                h = self.a[linear].double() @ x[-1].double() * weights.repeat_interleave(RANK) * SCALE
                expected.append(self.b[linear].double() @ h)
                linear += 1
        want, got = torch.cat(expected), torch.cat([y[-1] for y in self.ys]).double()
        return float((got - want).norm() / want.norm())


class Ours:
    """The library's gate and gated_lora: one launch, and two a group."""

    name = "deltaweave"

    def __init__(self, model: Model, library: Library) -> None:
        case = model.case
        self.model, self.library = model, library
        block = [Parameter(ParameterKind.GATE, HIDDEN, 1, 0, 0)]
        block += [Parameter(ParameterKind.LINEAR, features, out, 0, 0) for features, out in LINEARS]
        parameters = block * case.layers
        stack = len(block)
        shapes = []
        for index in range(len(parameters)):
            gate = index % stack == 0
            shapes.append(Record.mix(index, case.experts, True) if gate else Record.lora(index, [RANK] * case.experts))
        probe = DeviceArena(library, parameters, slots=1, size=256, max_rank=case.rank)
        size = case.fusions * (probe.arena.tenant_bytes(shapes) + 256)
        self.arena = DeviceArena(library, parameters, slots=case.fusions, size=size, max_rank=case.rank)
        tensors = self._tensors()
        for _ in range(case.fusions):
            slot = self.arena.arena.reserve(shapes)
            for index, shape in enumerate(shapes):
                arguments = self.arena.repack_arguments(slot, index, shape, tensors[index % stack])
                library.repack(arguments, torch.cuda.current_stream().cuda_stream)
            self.arena.publish(slot)
        torch.cuda.synchronize()
        self.weights = torch.zeros((case.tokens, 8), device="cuda")
        self.step = Step(self.arena, model.slots)
        self.step.make_plan()
        self.calls = [self._layer(layer * stack) for layer in range(case.layers)]

    def _tensors(self) -> list[dict[str, torch.Tensor]]:
        model, case = self.model, self.model.case
        numbers = torch.zeros(9, device="cuda")
        numbers[: case.experts], numbers[8] = model.bias, 1.0
        sigma = torch.full((case.rank,), SCALE, device="cuda")
        tensors = [{"sigma": numbers, "values": model.gate.float()}]
        for a, b in zip(model.a, model.b, strict=True):
            tensors.append({"v_codes": a.half(), "u_codes": b.half().T.contiguous(), "sigma": sigma})
        return tensors

    def _layer(self, first: int) -> tuple[Gate, list[Any]]:
        model = self.model
        gate = Gate(
            self.arena.batch(self.step.slots, DTYPE), first, HIDDEN, model.block.data_ptr(), HIDDEN,
            self.weights.data_ptr(), 8,
        )  # fmt: skip
        products, linear = [], first + 1
        for x, y, (_, outs) in zip(model.xs, model.ys, GROUPS, strict=True):
            pieces = [(linear + place, piece) for place, piece in enumerate(y.split(outs, dim=1))]
            products.append(self.step.product(x, pieces))
            products[-1][0].weights, products[-1][0].weights_stride = self.weights.data_ptr(), 8
            linear += len(outs)
        return gate, products

    def begin(self, layer: int) -> None:
        """The gate."""
        self.library.gate_weights(self.calls[layer][0], torch.cuda.current_stream().cuda_stream)

    def add(self, layer: int, group: int) -> None:
        """The LoRAs of linear layers with one input."""
        self.library.gated_lora(self.calls[layer][1][group][0], torch.cuda.current_stream().cuda_stream)


class Peft:
    """Plain torch as PEFT computes a batch of several adapters: by adapter, two products, a scaled and weighed add."""

    name = "PEFT-style torch"

    def __init__(self, model: Model) -> None:
        case = self.case = model.case
        self.model = model
        copies = (case.layers, case.fusions, case.experts)
        self.a, self.b = [], []
        for a, b in zip(model.a, model.b, strict=True):
            parts_a = a.view(case.experts, RANK, -1)
            parts_b = b.view(-1, case.experts, RANK).transpose(0, 1)
            self.a.append(parts_a.expand(*copies, *parts_a.shape[1:]).contiguous())
            self.b.append(parts_b.expand(*copies, *parts_b.shape[1:]).contiguous())
        self.gates = model.gate.expand(case.layers, case.fusions, -1, -1).contiguous()
        self.rows = [(model.slots == fusion).nonzero()[:, 0] for fusion in range(case.fusions)]

    def begin(self, layer: int) -> None:
        """The gates, one fusion after the other."""
        self.weights = [
            torch.softmax(functional.linear(self.model.block[rows], gate).float(), dim=-1) + self.model.bias
            for rows, gate in zip(self.rows, self.gates[layer], strict=True)
        ]

    def add(self, layer: int, group: int) -> None:
        """Two products, scale, weight and add for every linear layer, fusion and expert."""
        first = sum(len(outs) for _, outs in GROUPS[:group])
        pieces = self.model.ys[group].split(GROUPS[group][1], dim=1)
        for linear, y in enumerate(pieces, first):
            for fusion, rows in enumerate(self.rows):
                alone = self.case.fusions == 1
                x = self.model.xs[group] if alone else self.model.xs[group][rows]
                for expert in range(self.case.experts):
                    a, b = self.a[linear][layer, fusion, expert], self.b[linear][layer, fusion, expert]
                    term = functional.linear(functional.linear(x, a), b) * SCALE
                    term = (term * self.weights[fusion][:, expert, None]).to(DTYPE)
                    if alone:
                        y.add_(term)
                    else:
                        y.index_add_(0, rows, term)


class Vllm:
    """vLLM's shrink and expand over the experts' ranks behind each other; the weights act between them."""

    name = "vLLM LoRA kernels"

    def __init__(self, model: Model) -> None:
        case = self.case = model.case
        self.model, self.ops = model, vllm_ops()
        self.ops.clear_pointers()
        self.a = [a.expand(case.layers, case.fusions, -1, -1).contiguous() for a in model.a]
        self.b = [b.expand(case.layers, case.fusions, -1, -1).contiguous() for b in model.b]
        self.gates = model.gate.expand(case.layers, case.fusions, -1, -1).contiguous()
        self.h = [torch.zeros((len(outs), case.tokens, case.rank), device="cuda") for _, outs in GROUPS]
        meta = self.ops.meta.make(case.fusions, case.tokens, "cuda")
        meta.prepare_tensors(model.slots.int())
        self.meta = meta.meta_args(case.tokens, specialize_active_lora=True)

    def begin(self, layer: int) -> None:
        """Gathered gates, one product of all tokens."""
        logits = torch.bmm(self.gates[layer][self.model.slots], self.model.block[:, :, None])[:, :, 0]
        weights = torch.softmax(logits.float(), dim=-1) + self.model.bias
        self.ranks = (weights * SCALE).repeat_interleave(RANK, dim=1)

    def add(self, layer: int, group: int) -> None:
        """Shrink, weigh, expand."""
        first, outs = sum(len(outs) for _, outs in GROUPS[:group]), GROUPS[group][1]
        linears = range(first, first + len(outs))
        h = self.h[group]
        self.ops.shrink(self.model.xs[group], [self.a[linear][layer] for linear in linears], h, *self.meta, 1.0)
        h.mul_(self.ranks)
        self.ops.expand(
            h, [self.b[linear][layer] for linear in linears], self.model.ys[group], *self.meta, add_inputs=True
        )


def launches(work: Callable[[], None]) -> int:
    """Kernels that run on the device, copies and fills too."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def measure(model: Model, contender: Any) -> dict[str, Any]:
    """Step with and without fusions, launches a layer, error."""
    layers = model.case.layers

    def fuse(layer: int) -> None:
        contender.begin(layer)
        for group in range(len(GROUPS)):
            contender.add(layer, group)

    def step(with_fusions: bool) -> Callable[[], None]:
        def work() -> None:
            for layer in range(layers):
                if with_fusions:
                    contender.begin(layer)
                for group in range(len(GROUPS)):
                    model.run_base(layer, group)
                    if with_fusions:
                        contender.add(layer, group)

        return work

    error = model.error(fuse)
    base, fused = step(False), step(True)
    base()
    fused()
    torch.cuda.synchronize()
    return {
        "base_us_a_layer": graph_timing(base).median * 1e3 / layers,
        "fused_us_a_layer": graph_timing(fused).median * 1e3 / layers,
        "launches_a_layer": launches(lambda: fuse(0)),
        "relative_error": error,
    }


def row(case: Case, name: str, found: dict[str, Any], rate: float) -> dict[str, Any]:
    """With the goal's ratio."""
    roofline = sum(2 * features * out for features, out in LINEARS) / rate * 1e6
    base = min(found["base_us_a_layer"], roofline)
    added = found["fused_us_a_layer"] - found["base_us_a_layer"]
    line = {
        "contender": name, "tokens": case.tokens, "fusions": case.fusions, "experts": case.experts,
        "rank": RANK, "layers_run": case.layers, **found, "roofline_us_a_layer": roofline,
        "added_us_a_layer": added, "step_over_base": 1 + added / base,
    }  # fmt: skip
    print(
        f"{case.tokens:4d} tokens {case.fusions:3d} fusions k={case.experts} {name:18s} base {base:7.1f} us  "
        f"added {added:8.1f} us  step/base {line['step_over_base']:6.2f}  launches {line['launches_a_layer']:5d}  "
        f"error {found['relative_error']:.1e}",
        flush=True,
    )
    return line


def measure_all(options: argparse.Namespace, library: Library, rate: float) -> list[dict[str, Any]]:
    """Ours and PEFT's way first, then vLLM's, whose kernels compile; what is out of time says so."""
    begin = time.monotonic()
    base = [[normal((sum(outs), features), features**-0.5) for features, outs in GROUPS] for _ in range(options.layers)]
    cases = [Case(n, m, k, options.layers) for k in (2, 4) for n, m in ((1, 1), (8, 8), (32, 32), (32, 4), (128, 8))]
    jobs = [(case, name) for name in (Ours.name, Peft.name, Vllm.name) for case in cases]
    rows: list[dict[str, Any]] = []
    for case, name in jobs:
        if time.monotonic() - begin > options.seconds:
            rows.append({"contender": name, **vars(case), "reason": f"the run's {options.seconds:g} seconds were over"})
            continue
        if name == Peft.name:  # launch-bound: more layers would only take longer
            case = Case(case.tokens, case.fusions, case.experts, min(case.layers, 2))
        model = Model(case, base)
        try:
            contender = Ours(model, library) if name == Ours.name else Peft(model) if name == Peft.name else Vllm(model)
        except RivalMissingError as error:
            rows.append({"contender": name, **vars(case), "reason": str(error)})
            print(f"{name}: {error}", flush=True)
            continue
        rows.append(row(case, name, measure(model, contender), rate))
        del model, contender
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gated_lora.json")
    parser.add_argument("--layers", type=int, default=4, help=f"decoder blocks of the model's {LAYERS} that are run")
    parser.add_argument("--seconds", type=float, default=55.0, help="measuring ends after this time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gated_lora.py: needs an NVIDIA GPU", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    rate = copy_rate()
    torch.cuda.empty_cache()
    print(f"copy rate {rate / 1e12:.2f} TB/s", flush=True)
    rows = measure_all(options, Library(), rate)
    report = {
        **circumstances(),
        "model": f"Llama-2-7B: linear layers of {options.layers} decoder blocks; LoRAs of rank {RANK}; bf16",
        "copy_rate_bytes_per_second": rate,
        "rows": rows,
    }
    write_result(options.output, report)


if __name__ == "__main__":
    main()
