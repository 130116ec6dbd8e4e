# SPDX-License-Identifier: Apache-2.0
"""The vLLM host's layers in a decoder built like vLLM's: every token computes what its tenant computes alone."""

import itertools
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deltaweave.formats import DeltaExpert, DeltaReference, FormatError, write_fusion
from deltaweave.runtime_plugin.pytorch import Arena, ArenaError, AttachError
from deltaweave.runtime_plugin.pytorch import ops as step_ops
from deltaweave.runtime_plugin.vllm import ops
from deltaweave.runtime_plugin.vllm.layers import serve
from deltaweave.runtime_plugin.vllm.options import Options, arena_bytes
from deltaweave.runtime_plugin.vllm.step import Step
from deltaweave.runtime_plugin.vllm.table import BaseFiles, RankTable
from deltaweave.runtime_plugin.vllm.tenants import Adapter, Tenants
from family import Family, edit_config
from fused_decoder import RankModel, Ranks
from fusion_family import alone, make
from helpers import FAMILIES
from random_delta import budget_bands, random_delta
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("native")
LENGTHS = [7, 1, 12, 5]
FUSED = 2e-3  # an arena holds LoRAs in float16


class Server:
    """All ranks of a server of a family's base."""

    def __init__(
        self, family, ranks=1, *, at_once=4, most=8, capacity=8 << 20, tokens=64, delta_experts=0, accept_base=False
    ):
        self.family, self.paths = family, {}
        tables = [RankTable(BaseFiles(family.base), rank, ranks) for rank in range(ranks)]
        self.tenants, models = [], []
        for table in tables:
            arena = Arena(
                table,
                capacity_bytes=capacity,
                slots=at_once * (1 + delta_experts),
                device=torch.device("cpu"),
                max_rank=512,
            )
            step = Step(arena, tokens=tokens, fusions=True, delta_experts=delta_experts)
            self.tenants.append(Tenants(step, at_once=at_once, most=most, accept_base=accept_base))
            models.append(RankModel(family.model, table.cut))
            serve(models[-1], step, table)
        self.steps = [tenants.step for tenants in self.tenants]
        self.ranks = Ranks(models, tables, lambda rank: setattr(Step, "current", self.steps[rank]))
        self.numbers = itertools.count(1)

    def add(self, name, path):
        adapter = Adapter(next(self.numbers), name, str(path))
        self.paths[name] = adapter
        for tenants in self.tenants:
            tenants.add(adapter)
        return adapter

    def logits(self, names, prompts, warm=False):
        """Of all tokens of the prompts, each its tenant's."""
        ids = [self.paths[name].id if name else 0 for name in names]
        lengths = [len(prompt) for prompt in prompts]
        tokens = [number for number, length in zip(ids, lengths, strict=True) for _ in range(length)]
        adapters = {adapter.id: adapter for adapter in self.paths.values()}
        for tenants in self.tenants:
            tenants.begin(tokens, tokens, adapters)
        return self.ranks.logits(self.ranks.forward(torch.cat(prompts), lengths)).split(lengths)


def write(family, name):
    """A fusion's file, its deltas beside it."""
    fusion, folder = family.fusions[name], family.folder / f"{name}-fusion"
    folder.mkdir()
    experts = []
    for expert in fusion.experts:
        if isinstance(expert, DeltaExpert):
            shutil.copy(expert.delta.path, folder / f"{expert.name}.safetensors")
            expert = DeltaReference(expert.name, f"{expert.name}.safetensors", expert.delta.header_sha256)
        experts.append(expert)
    return write_fusion(folder / "fusion.safetensors", replace(fusion, experts=tuple(experts)))


def check(server, names, expected, tolerance=1e-5):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]
    names = list(itertools.islice(itertools.cycle(names), len(prompts)))
    for name, prompt, got in zip(names, prompts, server.logits(names, prompts), strict=True):
        wanted = expected(name, prompt[None])[0]
        known = wanted.shape[1]
        assert (got[:, :known] - wanted).norm() <= tolerance * wanted.norm(), name
        assert (got[:, known:] == -torch.inf).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_and_ranks(tmp_path, name, ranks):
    """Four heads over two key-value heads: four ranks repeat those. Groups of 128 are cut at 80 and at 40."""
    family = Family.make(tmp_path, name, tied=name == "qwen2")
    family.add("one", seed=1)
    family.add("two", seed=2, embeddings=False)
    server = Server(family, ranks)
    for delta, path in family.deltas.items():
        server.add(delta, path)
    check(server, ["one", None, "two"], family.alone)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_default_arena_has_room_for_tenants_at_a_sixteenth(tmp_path, ranks):
    """And not for many more: a rank has all of one factor of each projection, and its part of the other."""
    family = Family.make(tmp_path, hidden=512)
    delta = random_delta(tmp_path / "delta.safetensors", family.model, bands=budget_bands, vocabulary="none")
    capacity = max(arena_bytes(Options(), RankTable(BaseFiles(family.base), rank, ranks), 3) for rank in range(ranks))
    server = Server(family, ranks, at_once=3, capacity=capacity, accept_base=True)
    for name in ("one", "two", "three"):
        server.add(name, delta)
    for tenants in server.tenants:
        assert 3 * tenants.arena.tenant_bytes("1") > 0.65 * capacity


@pytest.mark.parametrize("ranks", [1, 2])
def test_biases_everywhere(tmp_path, ranks):
    family = Family.make(tmp_path, config={"attention_bias": True, "mlp_bias": True})
    family.add("one", seed=1)
    server = Server(family, ranks)
    server.add("one", family.deltas["one"])
    check(server, ["one", None], family.alone)


def test_rotary_embeddings_differ_by_token(tmp_path):
    family = Family.make(tmp_path)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    family.add("far", edit=lambda folder: edit_config(folder, rope_parameters=rope))
    server = Server(family)
    server.add("far", family.deltas["far"])
    check(server, ["far", None], family.alone)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fusions(tmp_path, ranks):
    family = make(tmp_path)
    server = Server(family, ranks, delta_experts=2, capacity=32 << 20)
    for name in ("three", "fixed", "deltas"):
        server.add(name, write(family, name))
    server.add("one", family.deltas["one"])
    check(server, ["three", "deltas", "one", "fixed"], lambda name, tokens: alone(family, name, tokens), FUSED)


@pytest.mark.parametrize("takes", [True, False], ids=["in the call", "before it"])
def test_base_where_a_kernel_can_compute_it(tmp_path, monkeypatch, takes):
    """As on a GPU, where an op has the base's weights: few tokens' products are made by the deltas' call."""
    family = make(tmp_path)
    server = Server(family, delta_experts=2, capacity=32 << 20)
    server.add("one", family.deltas["one"])
    server.add("deltas", write(family, "deltas"))
    [model], [tenants] = server.ranks.models, server.tenants
    block = model.model.layers[1]
    layers = [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj]
    bases, real = [], step_ops.delta_gemm

    def delta_gemm(*arguments, base=None):
        bases.append(base is not None)
        real(*arguments, base=base)

    monkeypatch.setattr(step_ops, "takes_base", lambda x, base: takes)
    monkeypatch.setattr(step_ops, "delta_gemm", delta_gemm)
    for names in (["one", None, "one"], ["deltas", "one", None], [None, None, None]):
        numbers = [server.paths[name].id if name else 0 for name in names]
        tenants.begin(numbers, numbers, {})
        ops.embed(torch.arange(3), model.model.embed_tokens.weight, server.steps[0].arena.directory[:1])  # lays out
        for layer in layers:
            x, method = torch.randn(3, layer.weight.shape[1]), layer.quant_method
            own = (method.directory, method.widths, method.weights, method.biases, method.in_offset, method.out_offsets)
            wanted = method.apply(layer, x, layer.bias)
            bases.clear()
            y = torch.full_like(wanted, torch.nan)
            ops.linear(x, y, layer.weight, layer.bias, *own)
            assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-6)
            assert bases[:1] == ([takes] if any(names) else []) and not any(bases[1:])


def test_fusions_cost_only_steps_that_have_one(tmp_path, monkeypatch):
    """And the graph that vLLM replays is of the same kind: warm-up's stand-ins are what its number says."""
    family = make(tmp_path)
    server = Server(family)
    server.add("three", write(family, "three"))
    server.add("one", family.deltas["one"])
    [step], [tenants] = server.steps, server.tenants
    called = []

    def counted(op, real):
        monkeypatch.setattr(step_ops, op, lambda *arguments: (called.append(op), real(*arguments)))

    counted("gate", step_ops.gate)
    counted("gated_lora", step_ops.gated_lora)
    for names, fused in ((["one", None], False), (["three", "one"], True), ([None], False)):
        check(server, names, lambda name, tokens: alone(family, name, tokens), FUSED)
        assert bool(called) == step.fused == fused
        called.clear()
    for number, fused in ((6, True), (5, False), (0, False)):  # four tenants at once: 5 is vLLM's number for any
        assert step.graph_case(number, 6) == number and step.rehearses_fusions == fused
    for name, fused in (("three", True), ("one", False)):
        tenants.begin([server.paths[name].id], [server.paths[name].id], {})
        assert step.graph_case(1, 6) == (6 if fused else 1) and step.graph_case(0, 6) == 0


def test_logits_are_left_alone_where_no_tenant_changes_them(tmp_path):
    family = Family.make(tmp_path)
    family.add("inner", seed=1, embeddings=False)
    family.add("outer", seed=2)
    server = Server(family)
    for name, path in family.deltas.items():
        server.add(name, path)
    for names, own in ((["inner", None], False), (["inner", "outer"], True), ([None], False)):
        check(server, names, family.alone)
        assert server.steps[0].own_logits == own
    server.tenants[0].remove(server.paths["outer"].id)
    check(server, ["inner"], family.alone)


def test_steps_longer_than_a_kernel_takes(tmp_path, monkeypatch):
    """Parts of 8 tokens instead of 2048."""
    monkeypatch.setattr("deltaweave.runtime_plugin.vllm.step.MAX_TOKENS", 8)
    family = make(tmp_path)
    server = Server(family)
    server.add("three", write(family, "three"))
    server.add("one", family.deltas["one"])
    check(server, ["one", "three", None], lambda name, tokens: alone(family, name, tokens), FUSED)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    family = Family.make(tmp_path_factory.mktemp("many"))
    for seed in range(4):
        family.add(f"t{seed}", seed=seed + 1)
    return family


def test_more_tenants_than_fit(many):
    """Three slots, room for two in host memory beyond one step: the others are read again."""
    server = Server(many, at_once=2, most=3)
    for name, path in many.deltas.items():
        server.add(name, path)
    for pair in [("t0", "t1"), ("t2", "t3"), ("t0", "t2"), ("t3", "t0")]:
        check(server, pair, many.alone)
    tenants = server.tenants[0]
    assert len(tenants.ids) == 3
    assert tenants.counts.loads > 4 and tenants.counts.evictions >= 4
    assert tenants.counts.resident <= 2


def test_a_name_with_another_file_has_another_id(many):
    server = Server(many)
    server.add("name", many.deltas["t0"])
    check(server, ["name"], lambda name, tokens: many.alone("t0", tokens))
    server.add("name", many.deltas["t1"])
    check(server, ["name"], lambda name, tokens: many.alone("t1", tokens))


def test_an_id_stands_for_one_tenant(many):
    server = Server(many)
    adapter = server.add("t0", many.deltas["t0"])
    with pytest.raises(ArenaError, match="one API server"):
        server.tenants[0].add(Adapter(adapter.id, "t1", str(many.deltas["t1"])))
    for name, path in (("t1", adapter.path), ("t0", str(many.deltas["t1"]))):  # as LLM.generate brings them
        with pytest.raises(ArenaError, match="an id of its own"):
            server.tenants[0].begin([adapter.id], [adapter.id], {adapter.id: Adapter(adapter.id, name, path)})


def test_the_largest_of_a_step_must_fit(many):
    server = Server(many, capacity=1 << 18)
    size = 0
    with pytest.raises(ArenaError, match="raise arena_gib"):
        for name, path in many.deltas.items():
            server.add(name, path)
            size += 1
    assert len(server.tenants[0].ids) == size > 0
    check(server, ["t0"], many.alone)


def test_what_a_request_asks_for_is_not_forgotten_before_its_step(many):
    """The oldest in host memory is asked for; then another one's file, read meanwhile, takes the place of the next."""
    server = Server(many, at_once=1, most=2)
    asked, other = (server.add(name, many.deltas[name]) for name in ("t0", "t1"))
    tenants = server.tenants[0]
    assert tenants.read_ahead(asked) is None
    newcomer = Adapter(3, "t2", str(many.deltas["t2"]))
    tenants.read_ahead(newcomer).result()
    check(server, ["t0"], many.alone)
    assert tenants.ids == {asked.id, newcomer.id}
    assert tenants.counts.loads == 3
    assert tenants.read_ahead(other) is not None


def test_read_ahead(many):
    """Beside steps; what was read counts before it is asked for, and is not read again then."""
    server = Server(many, at_once=2, most=2)
    server.add("t0", many.deltas["t0"])
    tenants = server.tenants[0]
    assert tenants.read_ahead(server.paths["t0"]) is None
    for number, name in enumerate(("t1", "t2"), 7):
        server.paths[name] = Adapter(number, name, str(many.deltas[name]))
        tenants.read_ahead(server.paths[name]).result()
    assert tenants.ids == {1, 7, 8} and tenants.counts.loads == 1
    check(server, ["t1", "t2"], many.alone)
    assert tenants.ids == {7, 8} and tenants.counts.loads == 3
    tenants.read_ahead(server.paths["t0"]).result()
    assert tenants.remove(1) and not tenants.remove(1)
    check(server, ["t1", "t2"], many.alone)
    assert tenants.ids == {7, 8} and tenants.counts.loads == 3


@pytest.mark.parametrize("late", [False, True], ids=["before it is there", "behind that"])
def test_read_ahead_beside_the_thread_that_admits(many, monkeypatch, late):
    """A request may ask for a tenant in any moment of its admission: it is not read, nor admitted, a second time."""
    server = Server(many)
    [tenants] = server.tenants
    adapter = server.paths["t0"] = Adapter(1, "t0", str(many.deltas["t0"]))
    admit, asked = tenants.arena.admit, []

    def beside(held):
        if late:
            admit(held)
        thread = threading.Thread(target=lambda: asked.append(tenants.read_ahead(adapter)))
        thread.start()
        thread.join()
        if not late:
            admit(held)

    monkeypatch.setattr(tenants.arena, "admit", beside)
    tenants.add(adapter)
    assert asked[0] is None or asked[0].result(10)
    assert tenants.read_ahead(adapter) is None
    check(server, ["t0", None], many.alone)
    assert tenants.counts.loads == 1 and tenants.ids == {1}


def test_what_cannot_be_read_ahead_fails_alone(many, tmp_path):
    server = Server(many)
    server.add("t0", many.deltas["t0"])
    gone = server.tenants[0].read_ahead(Adapter(5, "gone", str(tmp_path / "gone.safetensors")))
    with pytest.raises(FormatError, match="not readable"):
        gone.result()
    check(server, ["t0", None], many.alone)
    with pytest.raises(ArenaError, match="one API server"):
        server.tenants[0].read_ahead(Adapter(server.paths["t0"].id, "t1", str(many.deltas["t1"])))


def test_what_is_read_ahead_must_fit_together(many):
    server = Server(many)
    adapters = [Adapter(number, name, str(path)) for number, (name, path) in enumerate(many.deltas.items(), 1)]
    server.add("t0", many.deltas["t0"])
    size = server.tenants[0].arena.tenant_bytes("1")
    small = Server(many, at_once=4, capacity=size * 5 // 2)
    readings = [small.tenants[0].read_ahead(adapter) for adapter in adapters]
    assert [reading.exception() is None for reading in readings] == [True, True, False, False]
    with pytest.raises(ArenaError, match="the 3 largest tenants"):
        readings[2].result()
    small.tenants[0].begin([1, 2], [1, 2], {adapter.id: adapter for adapter in adapters})
    assert small.tenants[0].ids == {1, 2}


def test_a_forgotten_tenant_still_counts(tmp_path):
    """Else it could no longer be read again beside another large one, in the middle of a step."""
    family = Family.make(tmp_path)
    for seed, name in enumerate(("large", "small", "smaller", "newcomer"), 1):
        family.add(name, seed=seed, embeddings=name in ("large", "newcomer"))
    roomy = Server(family)
    large, small = (
        roomy.tenants[0].arena.tenant_bytes(str(roomy.add(name, family.deltas[name]).id)) for name in ("large", "small")
    )
    assert small < large
    server = Server(family, at_once=2, most=2, capacity=large + small)
    for name in ("large", "small", "smaller"):
        server.add(name, family.deltas[name])
    forgotten = server.paths["large"].id
    assert forgotten not in server.tenants[0].ids
    with pytest.raises(ArenaError, match="raise arena_gib"):
        server.add("newcomer", family.deltas["newcomer"])
    check(server, ["large", "small"], family.alone)
    server.tenants[0].remove(forgotten)
    server.add("newcomer", family.deltas["newcomer"])


def test_unknown_ids_and_stand_ins(many):
    server = Server(many)
    tenants = server.tenants[0]
    with pytest.raises(ArenaError, match="adapter id 9"):
        tenants.begin([9], [9], {})
    tenants.stand_in(9)
    tenants.begin([9, 0], [9], {})
    assert not tenants.step.active and (tenants.step.slots == -1).all()
    tenants.warm(active=True, fused=True)
    assert tenants.step.active
    tenants.clear_stand_ins()
    assert tenants.ids == set()


def test_a_fusion_beyond_the_options(tmp_path):
    family = make(tmp_path)
    path = write(family, "deltas")
    server = Server(family, delta_experts=1)
    with pytest.raises(ArenaError, match="raise delta_experts to 2"):
        server.add("deltas", path)
    assert not server.tenants[0].ids


def test_prompts_log_probabilities(many):
    """Logits of a view of the step's hidden states are of the tokens at its place in them."""
    server = Server(many)
    for name in ("t0", "t1"):
        server.add(name, many.deltas[name])
    a, b = server.paths["t0"].id, server.paths["t1"].id
    prompts = [torch.arange(3, 10), torch.arange(20, 25)]
    for tenants in server.tenants:
        tenants.begin([a] * 7 + [b] * 5, [a, b], {})
    hidden = server.ranks.forward(torch.cat(prompts), [7, 5])
    sampled = server.ranks.logits(hidden[[6, 11]])
    later = server.ranks.logits(hidden[7:11])
    assert torch.allclose(sampled[1], many.alone("t1", prompts[1][None])[0, -1], atol=1e-4)
    assert torch.allclose(later, many.alone("t1", prompts[1][None])[0, :4], atol=1e-4)


@torch.inference_mode()
def test_compiled_without_breaks_for_any_length(many):
    """As vLLM traces a block: one graph, the number of tokens dynamic; what is no tensor must not become part of it."""
    server = Server(many)
    server.add("t0", many.deltas["t0"])
    [model], [tenants] = server.ranks.models, server.tenants
    first, second = model.model.layers

    def block(ids, positions):
        rows = model.model.embed_tokens.quant_method.embedding(model.model.embed_tokens, ids)
        normed, residual = first.input_layernorm(rows, rows)
        qkv = first.self_attn.qkv_proj(normed)
        q, k = first.self_attn.rotary_emb(positions, qkv[:, :64], qkv[:, 64:96])
        return second.mlp.gate_up_proj(second.post_attention_layernorm(q, residual)[0]), k

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in (5, 9):
        numbers = [server.paths["t0"].id] * (length - 1) + [0]
        tenants.begin(numbers, numbers, {})
        ids, positions = torch.arange(3, 3 + length), torch.arange(length)
        for tensor in (ids, positions):
            torch._dynamo.mark_dynamic(tensor, 0)
        for got, wanted in zip(compiled(ids, positions), block(ids, positions), strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count == 1


def test_another_base_is_refused(tmp_path, many):
    other = Family.make(tmp_path, seed=9)
    server = Server(other)
    with pytest.raises(AttachError, match="accept_base"):
        server.add("t0", many.deltas["t0"])
    Server(other, accept_base=True).add("t0", many.deltas["t0"])


def test_contexts_are_switched_before_steps_of_the_base_too(tmp_path):
    family = Family.make(tmp_path)
    family.add("one", seed=1)
    server = Server(family)
    (tenants,) = server.tenants
    seen = []
    tenants.arena._quiet = SimpleNamespace(
        switch_if_quiet=lambda: seen.append("step"), disturb=lambda upload=None: seen.append("disturbed")
    )
    tenants.begin([0], [0], {})
    assert seen == ["step"]
    tenants.warm(active=False, fused=False)
    assert seen == ["step", "disturbed"]
    adapter = server.add("one", family.deltas["one"])
    assert seen[2:] == ["disturbed"]  # its upload
    tenants.begin([adapter.id], [adapter.id], {adapter.id: adapter})
    assert "step" in seen[3:]
