# SPDX-License-Identifier: Apache-2.0
"""Engines on a GPU against the PyTorch host and against each fine-tune alone in float32."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from deltaweave.formats import Delta
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.library import ArenaFullError
from deltaweave.runtime_plugin.pytorch import Arena, Decoder, attach
from deltaweave.runtime_plugin.requests import Request, Sampling
from deltaweave.runtime_plugin.trt.engine import Engine
from deltaweave.runtime_plugin.trt.errors import EngineError
from fusions import random_fusions
from helpers import FAMILIES, tiny_checkpoint
from random_delta import random_delta
from transformers import AutoModelForCausalLM

from deltaweave.engines import EngineOptions, build_engine

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if not any(find_spec(name) for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")):
    pytest.skip("needs TensorRT", allow_module_level=True)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPTS = [list(range(3, 3 + length)) for length in (5, 40, 9, 30, 2, 8)]
NAMES = ["dense", None, "rows", "none", "dense", None]


class Built:
    """A tiny base with fine-tunes, its engine, and the fine-tunes alone on the CPU."""

    TENANTS = ("dense", "rows", "none")

    def __init__(self, folder, family="llama", dtype="float16", build=None, **settings):
        self.folder = folder
        self.base = tiny_checkpoint(folder / "base", family, dtype=DTYPES[dtype], hidden=128, **settings)
        self.exact = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        self.deltas = {
            each: random_delta(folder / f"{each}.safetensors", self.exact, seed=seed, vocabulary=each)
            for seed, each in enumerate(self.TENANTS)
        }
        self.engine = folder / "engine"
        options = EngineOptions(
            dtype=dtype,
            max_batch=8,
            max_tokens=32,
            max_sequence=128,
            arena_bytes=16 << 20,
            **{"max_tenants": 4, **(build or {})},
        )
        build_engine(self.base, self.engine, options)

    def open(self, **settings):
        engine = Engine(self.engine, **settings)
        for name, path in self.deltas.items():
            engine.add(path, name, accept_base=True)
        return engine

    @torch.no_grad()
    def alone(self, name, tokens):
        if name is None:
            return self.exact(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        with Delta.open(self.deltas[name]) as delta, attach(self.exact, delta, accept_base=True):
            return self.alone(None, tokens)

    def torch_texts(self, requests, dtype=torch.float16, fusions=None):
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype).eval().cuda()
        arena = Arena.for_model(model, capacity_bytes=16 << 20, slots=8)
        for name, source in (self.deltas | (fusions or {})).items():
            arena.add(source, name, accept_base=True)
        with attach(model, arena) as attachment, Decoder(model, attachment, max_batch=8, max_length=128) as decoder:
            return decoder.run(requests)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Built(tmp_path_factory.mktemp("llama"))


def greedy(count=24):
    return [Request(prompt, name, count) for prompt, name in zip(PROMPTS, NAMES, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_each_fine_tunes_own(tmp_path, family, dtype):
    built, tokens = Built(tmp_path, family, dtype), list(range(3, 23))
    with built.open() as engine:
        found = {name: engine.logits(tokens, name) for name in (None, *Built.TENANTS)}
    expected = {name: built.alone(name, tokens) for name in found}
    known = expected[None].shape[1]
    noise = np.linalg.norm(found[None][:, :known] - expected[None]) / np.linalg.norm(expected[None])
    assert noise < 16 * torch.finfo(DTYPES[dtype]).eps
    for name in Built.TENANTS:
        assert np.linalg.norm(expected[name] - expected[None]) > 0.1 * np.linalg.norm(expected[None])
        assert (found[name][:, known:] == -np.inf).all()
        relative = np.linalg.norm(found[name][:, :known] - expected[name]) / np.linalg.norm(expected[name])
        assert relative < max(4 * noise, 8 * torch.finfo(DTYPES[dtype]).eps), (name, relative, noise)


def test_texts_are_the_pytorch_hosts(built):
    """Three tenants and the base in one batch; where texts part, the two tokens were all but equally likely."""
    with built.open() as engine:
        found = engine.run(greedy())
        assert engine.graphs == [8]
    assert_same_texts(greedy(), found, built.torch_texts(greedy()), built.alone)


def assert_same_texts(requests, found, expected, alone):
    for request, mine, theirs in zip(requests, found, expected, strict=True):
        if mine.tokens == theirs.tokens:
            continue
        place = next(i for i, pair in enumerate(zip(mine.tokens, theirs.tokens, strict=False)) if len(set(pair)) > 1)
        logits = alone(request.tenant, [*request.tokens, *theirs.tokens[:place]])[-1]
        assert abs(logits[mine.tokens[place]] - logits[theirs.tokens[place]]) < 0.02 * np.abs(logits).max()


def test_graphs_batches_and_chunks_do_not_show(built):
    """Prompts of 40 tokens go in two chunks of 32; alone, in a batch, with graphs and without: the same text."""
    with built.open() as engine, built.open(graphs=False) as eager:
        together = engine.run(greedy())
        assert together == eager.run(greedy())
        assert eager.graphs == []
        few = Engine(built.engine, max_batch=2)
        with few:
            for name, path in built.deltas.items():
                few.add(path, name, accept_base=True)
            assert [text.finish_reason for text in few.run(greedy())] == ["length"] * len(PROMPTS)


def test_stop_tokens_and_sampling(built):
    with built.open() as engine:
        [text] = engine.run([Request(PROMPTS[0], "dense", 24)])
        stop = text.tokens[5]
        [ended] = engine.run([Request(PROMPTS[0], "dense", 24, stop=frozenset([stop]))])
        assert ended.finish_reason == "stop"
        assert ended.tokens == text.tokens[: text.tokens.index(stop)]
        sampled = Request(PROMPTS[0], "dense", 24, sampling=Sampling(1.0, top_k=20, seed=5))
        first, second, other = (
            engine.run([request])[0].tokens
            for request in (
                sampled,
                sampled,
                Request(PROMPTS[0], "dense", 24, sampling=Sampling(1.0, top_k=20, seed=6)),
            )
        )
        assert first == second != other
        seen = []
        engine.run([Request(PROMPTS[0], None, 4)], lambda index, token: seen.append((index, token)))
        assert len(seen) == 4


def test_swaps_under_way_leave_others_as_they_are(built):
    """Between steps a visitor comes, is used and goes; nothing is captured again."""
    with built.open() as engine:
        calm = engine.run(greedy())
        graphs = dict(engine._decode_steps)

        def swap(index, token):
            if index == 0:
                engine.add(built.deltas["rows"], "visitor", accept_base=True)
                engine._arena.resident(["visitor"])
                engine.remove("visitor")
                engine.evict("none")

        assert engine.run(greedy(), swap) == calm
        assert engine._decode_steps == graphs


def test_thousands_of_steps_leak_nothing(built):
    from deltaweave.runtime_plugin.trt.memory import free_bytes

    long = [Request(prompt, name, 80) for prompt, name in zip(PROMPTS, NAMES, strict=True)]
    with built.open() as engine:
        engine.run(long)
        before = free_bytes()
        for _ in range(25):
            engine.run(long)
        assert before - free_bytes() < 4 << 20
        assert engine.stats().open_steps <= 1


def test_what_goes_wrong_is_said(built):
    with built.open() as engine:
        with pytest.raises(EngineError, match=r"no tenant 'nobody'"):
            engine.run([Request([3], "nobody", 2)])
        with pytest.raises(EngineError, match=r"100 tokens and 50 to write, the engine's cache holds 128"):
            engine.run([Request([3] * 100, None, 50)])
        with pytest.raises(EngineError, match=r"a tenant 'dense' is there already"):
            engine.add(built.deltas["dense"], "dense", accept_base=True)
        with pytest.raises(EngineError, match=r"made from base random"):
            engine.add(built.deltas["dense"], "again")
    small = Engine(built.engine, arena_bytes=1 << 16)
    with small, pytest.raises(ArenaFullError, match=r"the arena has 65536"):
        small.add(built.deltas["dense"], "dense", accept_base=True)


def test_a_failing_plugin_is_an_error_with_its_message(built):
    """An arena aligned to 128 bytes, which the kernels do not take: the step fails, the process lives, and says why."""
    with built.open() as engine:
        step = engine._decode_step(1)
        address = engine._arena.buffer.address
        assert step._context.set_tensor_address("arena", address + 128) in (True, False)
        if step._context.get_tensor_address("arena") == address:
            pytest.skip("TensorRT refuses the address itself")
        with pytest.raises(EngineError, match=r"arena"):
            step._queue()
        step._context.set_tensor_address("arena", address)
        assert engine.run([Request(PROMPTS[0], "dense", 4)])[0].finish_reason == "length"


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    options = {"fusions": True, "delta_experts": 2, "max_tenants": 8}
    built = Built(tmp_path_factory.mktemp("fused"), build=options)
    built.fusions = random_fusions(built.exact, Delta.open(built.deltas["dense"]))
    return built


class TestFusions:
    """An engine with gates and places for deltas as experts."""

    @torch.no_grad()
    def alone(self, fused, name, tokens):
        if name not in fused.fusions:
            return fused.alone(name, tokens)
        with attach(fused.exact, fused.fusions[name], accept_base=True):
            return fused.alone(None, tokens)

    def open(self, fused):
        engine = fused.open()
        for name, fusion in fused.fusions.items():
            engine.add(fusion, name, accept_base=True)
        return engine

    def test_logits_are_each_fusions_own(self, fused):
        tokens, names = list(range(3, 23)), [None, "dense", *fused.fusions]
        with self.open(fused) as engine:
            found = {name: engine.logits(tokens, name) for name in names}
        base = self.alone(fused, None, tokens)
        for name in names:
            expected = self.alone(fused, name, tokens)
            known = expected.shape[1]
            relative = np.linalg.norm(found[name][:, :known] - expected) / np.linalg.norm(expected)
            assert relative < 16 * torch.finfo(torch.float16).eps, (name, relative)
            if name in fused.fusions:
                assert np.linalg.norm(expected - base) > 0.1 * np.linalg.norm(base)

    def test_texts_are_the_pytorch_hosts_and_swaps_leave_others_alone(self, fused):
        """Fusions, deltas and the base in one batch; a fusion goes and comes under captured graphs."""
        tenants = ["loras", None, "joined", "dense", "loras", "rows"]
        requests = [Request(prompt, tenant, 24) for prompt, tenant in zip(PROMPTS, tenants, strict=True)]
        with self.open(fused) as engine:
            found = engine.run(requests)
            graphs, free = engine.graphs, engine.stats().free_bytes
            assert engine.run(requests) == found
            engine.remove("joined")
            others = [request for request in requests if request.tenant != "joined"]
            assert engine.run(others) == [text for text, r in zip(found, requests, strict=True) if r.tenant != "joined"]
            with pytest.raises(EngineError, match="no tenant 'joined'"):
                engine.run(requests)
            engine.add(fused.fusions["joined"], "joined", accept_base=True)
            assert engine.run(requests) == found
            assert (engine.graphs, engine.stats().free_bytes) == (graphs, free)
        expected = fused.torch_texts(requests, fusions=fused.fusions)
        assert_same_texts(requests, found, expected, lambda name, tokens: self.alone(fused, name, tokens))

    def test_what_an_engine_was_not_built_for(self, fused, built):
        with built.open() as engine, pytest.raises(AttachError, match="build it with --fusions"):
            engine.add(fused.fusions["loras"], "loras", accept_base=True)
        experts = fused.fusions["joined"].experts
        late = replace(fused.fusions["joined"], experts=(experts[0], experts[2], experts[1]))
        with self.open(fused) as engine, pytest.raises(AttachError, match="build it with --delta-experts 3"):
            engine.add(late, "late", accept_base=True)
