# SPDX-License-Identifier: Apache-2.0
"""The PyTorch host on a GPU: ops against the CPU reference, models against float32, graphs, swaps under way."""

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from delta_gemm_case import Case, Setup
from deltaweave.formats import Delta
from deltaweave.runtime_plugin.pytorch import Arena, Decoder, OpError, Request, Sampling, attach, decode, ops
from deltaweave.runtime_plugin.pytorch.context_switch import context_switch
from deltaweave.runtime_plugin.pytorch.native import native_library
from deltaweave.runtime_plugin.records import Rows
from factored_records import RandomBand
from fusions import random_fusions
from gpu_checks import assert_close
from helpers import FAMILIES, tiny_checkpoint
from op_arena import (
    BIAS,
    EMBEDDING,
    HEAD,
    IN,
    LINEAR,
    MAX_RANK,
    NORM,
    OTHER,
    OUTS,
    SPARE,
    OpArena,
    random_band,
    random_dense,
    random_factored,
    slots_of,
)
from random_delta import random_delta
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(scope="session")
def gpu(native):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not native_library().has_cuda:
        pytest.skip("needs DELTAWEAVE_LIBRARY, a libdeltaweave built with CUDA")


def error(got, expected, term):
    """Largest error over the RMS of what was added, and the error's norm over that of what was added."""
    difference = got.double().cpu() - expected.double()
    return float(difference.abs().max() / term.double().square().mean().sqrt()), float(
        difference.norm() / term.double().norm()
    )


class Both:
    """The same tenants in an arena on the CPU and in one on the GPU; ops on both."""

    def __init__(self, seed=0):
        generator = np.random.default_rng(seed)
        bands = [random_band(generator, *band) for band in ((8, 2), (3, 19), (2, 40, True), (16, 9), (1, 30), (4, 17))]
        rows = Rows(np.array([0, 3, 69, 88], np.int32), torch.randn(4, IN).half().numpy())
        dense = random_dense(generator, (70, IN))
        tenants = [
            {
                LINEAR: random_factored(generator, (OUTS[0], IN), bands),
                OTHER: random_factored(generator, (OUTS[1], IN), bands[:2], 256),
                EMBEDDING: dense,
                HEAD: dense,
                NORM: torch.rand(IN),
                BIAS: torch.randn(OUTS[0]),
            },
            {OTHER: random_factored(generator, (OUTS[1], IN), bands[2:]), EMBEDDING: rows, HEAD: rows},
            {HEAD: random_factored(generator, (SPARE, IN), bands[:3]), EMBEDDING: random_dense(generator, (90, IN), 2)},
        ]
        self.arenas = {device: OpArena(device) for device in ("cpu", "cuda")}
        for arena in self.arenas.values():
            for slot, tenant in enumerate(tenants):
                assert arena.add(tenant) == slot

    def run(self, name, slots, *tensors, **settings):
        """An op on both devices; float32 on the CPU. Gives both results, or for ops that write, what they wrote."""
        results = []
        for device, arena in self.arenas.items():
            moved = copy.deepcopy([_moved(tensor, device) for tensor in tensors])
            whose = slots_of(slots, device)
            plan_or_slots = arena.plan(whose) if "gemm" in name else whose
            result = getattr(ops, name)(arena.buffer, arena.directory, plan_or_slots, *moved, **settings)
            results.append(moved[1 if "gemm" in name else 0] if result is None else result)
        return results


def _moved(value, device):
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.cuda() if device == "cuda" else value.float() if value.is_floating_point() else value


@pytest.fixture(scope="module")
def both():
    return Both()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 33, 300, 2048])
class TestOps:
    """Slots include all tenants, the base's -1 and some out of range."""

    def slots(self, tokens):
        drawn = np.random.default_rng(tokens).integers(-1, 4, tokens).tolist()
        return [0, 1, 2, *drawn[3:]] if tokens > 1 else [0]

    def test_delta_gemm(self, both, tokens, dtype):
        x = torch.randn(tokens, IN).to(dtype)
        ys = [torch.zeros(tokens, out, dtype=dtype) for out in OUTS]
        expected, got = both.run("delta_gemm", self.slots(tokens), x, ys, [LINEAR, OTHER], MAX_RANK)
        for mine, reference in zip(got, expected, strict=True):
            assert error(mine, reference, reference)[1] < TOLERANCE[dtype]

    def test_lm_head(self, both, tokens, dtype):
        x = torch.randn(tokens, IN).to(dtype)
        y = torch.zeros(tokens, SPARE, dtype=dtype)
        for name in ("delta_gemm", "dense_gemm"):
            many = name == "delta_gemm"
            arguments = ([y], [HEAD]) if many else (y, HEAD)
            slots = [2] if many and tokens == 1 else self.slots(tokens)
            expected, got = both.run(name, slots, x, *arguments, MAX_RANK)
            mine, reference = (got[0], expected[0]) if many else (got, expected)
            assert error(mine, reference, reference)[1] < TOLERANCE[dtype]

    def test_rms_norm(self, both, tokens, dtype):
        x, weight = torch.randn(tokens, 3, IN).to(dtype), torch.rand(IN).to(dtype)
        expected, got = both.run("rms_norm", self.slots(tokens), x, weight, 1e-5, NORM)
        assert error(got, expected, expected)[1] < TOLERANCE[dtype]

    def test_add_bias(self, both, tokens, dtype):
        y, bias = torch.randn(tokens, OUTS[0]).to(dtype), torch.randn(OUTS[0]).to(dtype)
        expected, got = both.run("add_bias", self.slots(tokens), [y, y.clone()], [bias, None], [BIAS, BIAS])
        for mine, reference in zip(got, expected, strict=True):
            assert error(mine, reference, reference)[1] < TOLERANCE[dtype]

    def test_embed(self, both, tokens, dtype):
        table = torch.randn(60, IN).to(dtype)
        ids = (torch.arange(tokens) + 5) % SPARE
        expected, got = both.run("embed", self.slots(tokens), ids, table, EMBEDDING)
        assert got.dtype == dtype
        assert error(got, expected, expected)[1] < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["delta_gemm", "rms_norm", "add_bias", "embed"])
def test_opcheck(both, name):
    arena, slots = both.arenas["cuda"], slots_of([0, -1, 1], "cuda")
    held = (arena.buffer, arena.directory)
    x, y, weight = (torch.randn(shape).cuda().half() for shape in ((3, IN), (3, OUTS[0]), (OUTS[0], IN)))
    arguments = {
        "delta_gemm": (*held, arena.plan(slots), x, [y], [LINEAR], MAX_RANK, 0, None, None, [weight]),
        "rms_norm": (*held, slots, x, x[0].contiguous(), 1e-5, NORM),
        "add_bias": (*held, slots, [y], [None], [BIAS]),
        "embed": (*held, slots, torch.arange(3).cuda(), x, EMBEDDING),
    }
    torch.library.opcheck(getattr(ops, name), arguments[name])


PRODUCTS = {
    "qkv": Case(in_features=1024, outs=(1024, 256, 256)),
    "gate and up": Case(in_features=1024, outs=(2752, 2752)),
    "down": Case(in_features=2752, outs=(1024,)),
    "ragged outputs": Case(in_features=1000, outs=(331, 77)),
    "a kernel cannot": Case(in_features=331, outs=(77, 5), bands=(RandomBand(3, 5), RandomBand(2, 3))),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_base_and_delta_in_one_call(name, dtype):
    """Into columns of one y, as vLLM's host has them, eagerly and in a CUDA graph, against float64."""
    case = replace(PRODUCTS[name], tokens=9, slots=[0, 2, -1, 1, 0, 0, 2, -1, 1], dtype=dtype)
    setup = Setup(native_library(), case)
    setup.arena.directory[0, 1] = 0  # a tenant without a record
    weight = torch.randn(sum(case.outs), case.in_features, device="cuda").to(setup.x.dtype)
    weight *= 0.1 / case.in_features**0.5  # as large as the deltas
    base, slots = weight.split(case.outs), setup.slots.cuda()
    deltas = np.concatenate([setup.expected(index) for index in range(len(case.outs))], axis=1)
    deltas[slots.cpu().numpy() == 1, : case.outs[0]] = 0
    expected = setup.x.double() @ weight.double().T + torch.from_numpy(deltas).cuda()
    plan = torch.zeros(native_library().plan_bytes(9) // 4, dtype=torch.int32, device="cuda")
    for tokens in range(1, 10):
        x, y = setup.x[:tokens], torch.empty(tokens, weight.shape[0], device="cuda", dtype=setup.x.dtype)
        assert ops.takes_base(x, base) == (tokens <= 8 and case.in_features % 8 == 0)

        def work(x=x, y=y, tokens=tokens):
            ops.plan(slots[:tokens], setup.arena.directory.shape[1], plan)
            held = (setup.arena.buffer, setup.arena.directory, plan)
            ys, parameters = list(y.split(case.outs, dim=1)), list(range(len(case.outs)))
            ops.delta_gemm(*held, x, ys, parameters, setup.arena.max_rank, base=base)

        y.fill_(torch.nan)
        work()
        eager = y.clone()
        assert_close(eager.double().cpu().numpy(), expected[:tokens].cpu().numpy(), dtype, f"{name}, {tokens} tokens")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, eager)


def test_float32_is_refused(both):
    arena, slots = both.arenas["cuda"], slots_of([0], "cuda")
    with pytest.raises(OpError, match=r"x of torch.float32, the kernels take float16 and bfloat16"):
        ops.rms_norm(
            arena.buffer, arena.directory, slots, torch.zeros(1, IN).cuda(), torch.zeros(IN).cuda(), 1e-5, NORM
        )


class Served:
    """A tiny model on the GPU with tenants, and the same on the CPU in float32."""

    NAMES = ("dense", "rows", "none", "other")

    def __init__(self, folder, name="llama", *, tied=False, dtype=torch.float16, **settings):
        base = tiny_checkpoint(folder / "base", name, tied=tied, dtype=dtype, hidden=128)
        self.exact, self.model = (
            AutoModelForCausalLM.from_pretrained(base, dtype=d).eval() for d in (torch.float32, dtype)
        )
        self.model.cuda()
        self.deltas = {
            each: random_delta(
                folder / f"{each}.safetensors", self.exact, seed=seed, vocabulary="dense" if each == "other" else each
            )
            for seed, each in enumerate(self.NAMES)
        }
        self.arena = Arena.for_model(self.model, **{"capacity_bytes": 16 << 20, "slots": 4, **settings})
        for each, path in self.deltas.items():
            self.arena.add(path, each, accept_base=True)

    @torch.no_grad()
    def alone(self, name, tokens):
        if name is None:
            return self.exact(tokens, use_cache=False).logits
        with Delta.open(self.deltas[name]) as delta, attach(self.exact, delta, accept_base=True):
            return self.alone(None, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_compute_their_fine_tunes(tmp_path, name, tied, dtype):
    """Of as few tokens as have their base's products made in the deltas' call, and of more."""
    served = Served(tmp_path, name, tied=tied, dtype=dtype)
    for length in (1, 40):
        check_rows(served, torch.arange(3, 3 + length)[None], [None, *Served.NAMES], dtype)


def check_rows(served, tokens, rows, dtype):
    with torch.no_grad(), attach(served.model, served.arena) as attachment, attachment.step(rows):
        mixed = served.model(tokens.repeat(len(rows), 1).cuda(), use_cache=False).logits.cpu()
    alone = [served.alone(each, tokens)[0] for each in rows]
    assert (alone[1] - alone[0]).norm() > 0.1 * alone[0].norm()
    noise = (mixed[0, :, : alone[0].shape[1]].float() - alone[0]).norm() / alone[0].norm()
    for got, expected in zip(mixed[1:], alone[1:], strict=True):
        known = expected.shape[1]
        assert (got[:, known:] == -torch.inf).all()
        relative = (got[:, :known].float() - expected).norm() / expected.norm()
        assert relative < max(4 * noise, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_compute_their_fusions(tmp_path, name, dtype):
    """Gated LoRAs, a delta among them, a delta and the base in one batch."""
    served = Served(tmp_path, name, dtype=dtype, slots=8)
    fusions = random_fusions(served.exact, Delta.open(served.deltas["dense"]))
    for each, fusion in fusions.items():
        served.arena.add(fusion, each, accept_base=True)
    tokens, rows = torch.arange(3, 43)[None], [None, "joined", "rows", "loras"]
    with torch.no_grad(), attach(served.model, served.arena) as attachment, attachment.step(rows):
        mixed = served.model(tokens.repeat(len(rows), 1).cuda(), use_cache=False).logits.cpu().float()
    base = served.alone(None, tokens)[0]
    known = base.shape[1]
    noise = (mixed[0, :, :known] - base).norm() / base.norm()
    for row, each in ((1, "joined"), (3, "loras")):
        with torch.no_grad(), attach(served.exact, fusions[each], accept_base=True):
            expected = served.alone(None, tokens)[0]
        assert (expected - base).norm() > 0.1 * base.norm()
        relative = (mixed[row, :, :known] - expected).norm() / expected.norm()
        assert relative < max(4 * noise, 8 * torch.finfo(dtype).eps)


def test_graphs_follow_fusions(tmp_path):
    """Fusions come and go between runs of one decoder; its graphs give what eager steps give."""
    served = Served(tmp_path, slots=8)
    fusions = random_fusions(served.exact, Delta.open(served.deltas["dense"]))
    texts = {True: [], False: []}
    with attach(served.model, served.arena) as attachment:
        for graphs, found in texts.items():
            with Decoder(served.model, attachment, max_batch=4, max_length=64, graphs=graphs) as decoder:
                found.append(decoder.run(requests(["dense", None, "rows", "dense"])))
                for each, fusion in fusions.items():
                    served.arena.add(fusion, each, accept_base=True)
                found.append(decoder.run(requests(["loras", None, "joined", "dense"])))
                served.arena.remove("joined")
                found.append(decoder.run(requests(["loras", None, "rows", "dense"])))
                served.arena.remove("loras")
                found.append(decoder.run(requests(["dense", None, "rows", "dense"])))
    assert texts[True] == texts[False]
    before, joined, lone, after = texts[True]
    assert before == after
    assert before[1] == joined[1] == lone[1]
    assert joined[0] == lone[0] != before[0]


@pytest.mark.parametrize("length", [3, 20])
def test_compiles_without_graph_breaks(tmp_path, length):
    served = Served(tmp_path, "qwen2")
    tokens = torch.arange(3, 3 + 2 * length).view(2, length).cuda()
    with torch.no_grad(), attach(served.model, served.arena) as attachment:
        compiled = torch.compile(served.model, fullgraph=True, backend="aot_eager")
        for rows in (["dense", None], ["other", "rows"]):
            with attachment.step(rows):
                got, expected = (model(tokens, use_cache=False).logits for model in (compiled, served.model))
            known = expected > -torch.inf
            assert (got[known] - expected[known]).norm() <= 4e-3 * expected[known].norm()


PROMPTS = [list(range(3, 3 + length)) for length in (5, 17, 9, 30, 2, 8)]


def recorded(monkeypatch):
    """Logits of all steps to come, as they are chosen from."""
    seen = []
    choose = decode.choose

    def record(logits, choosers, texts):
        seen.append(logits.clone())
        return choose(logits, choosers, texts)

    monkeypatch.setattr(decode, "choose", record)
    return seen


def requests(names, count=12, **settings):
    return [
        Request(prompt, name, count, sampling=Sampling(**settings))
        for prompt, name in zip(PROMPTS, names, strict=False)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_compute_what_eager_steps_do(tmp_path, monkeypatch, dtype):
    served = Served(tmp_path, "qwen3", tied=True, dtype=dtype)
    seen = recorded(monkeypatch)
    names = ["dense", None, "rows", "other", "none", "dense"]
    texts, logits = [], []
    with attach(served.model, served.arena) as attachment:
        for graphs in (False, True):
            with Decoder(served.model, attachment, max_batch=4, max_length=64, graphs=graphs) as decoder:
                texts.append(decoder.run(requests(names)))
                assert decoder.graphs == ([2, 4] if graphs else [])
                assert served.arena.stats().live_graphs == len(decoder.graphs)
            logits.append(list(seen))
            seen.clear()
    assert served.arena.stats().live_graphs == 0
    assert texts[0] == texts[1]
    for eager, replayed in zip(*logits, strict=True):
        assert torch.equal(eager, replayed)


def test_swaps_under_way_leave_others_bit_identical(tmp_path, monkeypatch):
    """Between all steps another tenant is added, used, evicted and removed; graphs are not captured again."""
    served = Served(tmp_path, slots=3, capacity_bytes=16 << 20)
    seen = recorded(monkeypatch)
    captures = []
    capture = Decoder._capture
    monkeypatch.setattr(Decoder, "_capture", lambda self, bucket: captures.append(bucket) or capture(self, bucket))
    names = ["dense", "rows", None, "dense"]
    logits = []
    with attach(served.model, served.arena) as attachment:
        for swapping in (False, True):
            captures.clear()

            def swap(index, token, swapping=swapping):
                if swapping and index == 0:
                    served.arena.resident(["none" if token % 2 else "other"])
                    served.arena.add(served.deltas["other"], "visitor", accept_base=True)
                    served.arena.remove("visitor")

            with Decoder(served.model, attachment, max_batch=4, max_length=64) as decoder:
                decoder.run(requests(names), swap)
            assert captures == [4]
            logits.append(list(seen))
            seen.clear()
    for before, after in zip(*logits, strict=True):
        assert torch.equal(before, after)


def test_evictions_in_flight(tmp_path):
    """Steps are queued without waiting, over more tenants than fit: each finds its own."""
    served = Served(tmp_path, slots=2)
    tokens = torch.arange(3, 23)[None].cuda()
    expected, found = {}, []
    with torch.no_grad(), attach(served.model, served.arena) as attachment:
        for name in Served.NAMES:
            with attachment.step([name]):
                expected[name] = served.model(tokens, use_cache=False).logits
            torch.cuda.synchronize()
        for name in Served.NAMES * 8:
            with attachment.step([name]):
                found.append((name, served.model(tokens, use_cache=False).logits))
    torch.cuda.synchronize()
    assert all(torch.equal(logits, expected[name]) for name, logits in found)
    assert served.arena.stats().open_steps == 0
    assert served.arena.stats().resident_slots == 2


@pytest.mark.filterwarnings("error:no second CUDA context")
def test_a_switch_of_contexts_gives_back_what_changes_of_streams_cost():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("contexts are switched on compute capability 9.0")
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("needs the GPU for itself: other processes switch its contexts")
    switch, numbers = context_switch(torch.cuda.current_device()), torch.ones(1 << 20, device="cuda")
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(3)]
    with torch.cuda.graph(graph):
        for _ in range(400):
            numbers.mul_(1)

    def microseconds():
        return min(_replay_us(graph) for _ in range(20))

    for stream in 40 * streams:
        with torch.cuda.stream(stream):
            numbers.mul_(1)
        torch.cuda.synchronize()
    changed = microseconds()
    switch()
    switched = microseconds()
    print(f"after changes of stream {changed:.1f} us, after a switch {switched:.1f}")
    assert torch.equal(numbers, torch.ones_like(numbers))
    assert switched < 0.97 * changed, "nothing was gained; does another process use this GPU?"


def _replay_us(graph):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)
