# SPDX-License-Identifier: Apache-2.0
"""Gated fusion against the equation written out in float64, and against PEFT's own forward."""

import copy
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from deltaweave.converter import BitDeltaOptions, apply, compress_bitdelta
from deltaweave.converter.lora import read_peft_lora
from deltaweave.formats import Architecture, Delta, DeltaExpert, TensorIdentity, tensor_digest
from deltaweave.formats.fusion import FixedGate, LoraReference
from deltaweave.runtime_plugin.fit import AttachError
from deltaweave.runtime_plugin.pytorch.attach import attach
from deltaweave.runtime_plugin.pytorch.fusion import StackedLora, attach_fusion, gate_weights, gated_lora
from family import Family, load
from fusions import SHAPES, make_fusion, make_gate, make_lora, single
from helpers import FAMILIES, perturbed, tiny_checkpoint
from transformers import AutoModelForCausalLM

TOKENS = 3 + torch.arange(24).reshape(2, 12)  # no padding, which generation would mask


@pytest.fixture
def model(tmp_path):
    folder = tiny_checkpoint(tmp_path / "base", dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def softmax64(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.1])
def test_equation_in_float64(count, temperature):
    generator = np.random.default_rng(count)
    block = make_gate(generator, count, layers=1).blocks["model.layers.0"]
    x_block, x = generator.standard_normal((2, 7, 64))
    name = "model.layers.0.self_attn.v_proj"
    loras = [make_lora(generator, 1 + 2 * index, [name], scale=0.5 + index) for index in range(count)]

    w, b = (array.to_float32().astype(np.float64) for array in (block.weight, block.bias))
    expected_weights = softmax64(x_block @ w.T / temperature) + b
    expected = sum(
        expected_weights[:, index, None]
        * lora.modules[name].scale
        * (x @ lora.modules[name].a.to_float32().T.astype(np.float64))
        @ lora.modules[name].b.to_float32().T.astype(np.float64)
        for index, lora in enumerate(loras)
    )

    weights = gate_weights(torch.tensor(x_block), torch.tensor(w), torch.tensor(b, dtype=torch.float64), temperature)
    stacked = StackedLora.of([(index, lora.modules[name]) for index, lora in enumerate(loras)], torch.device("cpu"))
    y = gated_lora(torch.tensor(x), weights, stacked)
    assert weights.dtype == y.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), expected_weights, atol=2e-5)
    assert np.abs(y.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_gate_of_zeros_starts_on_the_task_lora():
    """LoRA-Flow's start for (language, task)."""
    weights = gate_weights(torch.randn(5, 8), torch.zeros(2, 8), torch.tensor([-0.5, 0.5]), 1.0)
    assert torch.equal(weights, torch.tensor([[0.0, 1.0]]).expand(5, 2))


def forward64(model, fusion):
    """Logits with every gated layer computed by hooks in float64 from the equation, LoRA by LoRA."""
    model = model.double()
    seen, handles = {}, []
    for name in fusion.gate.blocks:

        def remember(module, args, kwargs, name=name):
            seen[name] = args[0] if args else kwargs["hidden_states"]

        handles.append(model.get_submodule(name).register_forward_pre_hook(remember, with_kwargs=True))
    for name in SHAPES:

        def add(module, args, y, name=name):
            block = ".".join(name.split(".")[:3])
            gate = fusion.gate.blocks[block]
            w, b = (torch.tensor(array.to_float32()).double() for array in (gate.weight, gate.bias))
            logit = seen[block] @ w.T / fusion.gate.temperature
            weights = torch.exp(logit) / torch.exp(logit).sum(-1, keepdim=True) + b
            for index, lora in enumerate(fusion.loras):
                if name in lora.modules:
                    m = lora.modules[name]
                    a, up = (torch.tensor(array.to_float32()).double() for array in (m.a, m.b))
                    y = y + weights[..., index : index + 1] * m.scale * (args[0] @ a.T @ up.T)
            return y

        handles.append(model.get_submodule(name).register_forward_hook(add))
    result = logits(model)
    for handle in handles:
        handle.remove()
    model.float()
    return result


def test_model_against_float64(model):
    fusion = make_fusion(count=3)
    expected, base = forward64(model, fusion), logits(model)
    with attach_fusion(model, fusion, accept_base=True):
        found = logits(model)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max() < 0.1 * (base - expected).abs().max()
    assert torch.equal(logits(model), base)


def test_generation_with_a_cache_equals_the_whole_forward(model):
    with attach_fusion(model, make_fusion(count=2), accept_base=True):
        text = model.generate(TOKENS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        whole = logits(model, text)
    assert text.shape[1] > TOKENS.shape[1]
    assert torch.equal(whole[0, TOKENS.shape[1] - 1 : -1].argmax(-1), text[0, TOKENS.shape[1] :])


def peft_model(model, lora_sets, tmp_path):
    """The same LoRAs in PEFT, written to folders and read back by it; (its model, our reading of the folders)."""
    wrapped = None
    for name, settings in lora_sets.items():
        config = peft.LoraConfig(**settings)
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapters")
    return wrapped.eval(), [read_peft_lora(tmp_path / "adapters" / name) for name in lora_sets]


def fresh(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "up_proj", "o_proj"],
            "rank_pattern": {"up_proj": 2, r"layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"o_proj": 3},
        },
    ],
)
def test_single_lora_is_peft(model, settings, tmp_path):
    base = logits(model)
    wrapped, (lora,) = peft_model(model, {"one": settings}, tmp_path)
    expected, plain = logits(wrapped), fresh(tmp_path)
    with attach_fusion(plain, single(lora), accept_base=True):
        torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 0.1


def test_fixed_weights_are_pefts_weighted_adapter(model, tmp_path):
    sets = {
        "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
        "two": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]},
    }
    wrapped, loras = peft_model(model, sets, tmp_path)
    weights = (0.3, 0.6)
    wrapped.add_weighted_adapter(list(sets), list(weights), "both", combination_type="cat")
    wrapped.set_adapter("both")
    expected, plain = logits(wrapped), fresh(tmp_path)
    fusion = replace(make_fusion(count=2), experts=tuple(loras), gate=FixedGate(weights))
    with attach_fusion(plain, fusion, accept_base=True):
        torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=1e-4)


def test_its_own_base_is_accepted(model):
    fusion = make_fusion(count=2)
    state = model.state_dict()
    tensors = {
        name: TensorIdentity(tensor_digest(value.numpy().tobytes()), "F32", tuple(value.shape))
        for name, value in state.items()
    }
    before = logits(model)
    with attach_fusion(model, replace(fusion, base=replace(fusion.base, tensors=tensors))):
        assert not torch.equal(logits(model), before)


def test_what_does_not_fit(model):
    fusion, generator = make_fusion(count=2), np.random.default_rng(0)
    before = logits(model)

    def refuse(message, fusion, **options):
        with pytest.raises(AttachError, match=message):
            attach_fusion(model, fusion, accept_base=True, **options)

    refuse("gates of 3 blocks, the model has 2 layers", replace(fusion, gate=make_gate(generator, 2, layers=3)))
    refuse("read hidden_size 32, the model has 64", replace(fusion, gate=make_gate(generator, 2, hidden=32)))
    refuse("of a qwen2", replace(fusion, architecture=replace(fusion.architecture, model_type="qwen2")))
    reference = LoraReference("other", "other.safetensors", "00" * 32)
    refuse("resolve_fusion", replace(fusion, experts=(fusion.loras[0], reference)))
    lora = make_lora(generator, 2, list(SHAPES)[:1])
    renamed = replace(lora, modules={"model.layers.0.self_attn.other": next(iter(lora.modules.values()))})
    refuse("no such module", single(renamed))
    norm = replace(lora, modules={"model.layers.0.input_layernorm": next(iter(lora.modules.values()))})
    refuse("expected a linear layer", single(norm))
    wrong = replace(lora, modules={"model.layers.0.self_attn.k_proj": next(iter(lora.modules.values()))})
    refuse(r"the model has shape \[32, 64\], the expert \[64, 64\]", single(wrong))
    other = replace(fusion.base, tensors={"model.norm.weight": TensorIdentity("ab" * 32, "F32", (64,))})
    with pytest.raises(AttachError, match="not those of the base"):
        attach_fusion(model, replace(fusion, base=other))
    assert torch.equal(logits(model), before)
    with attach_fusion(model, fusion, accept_base=True):
        refuse("attached already", fusion)
    assert torch.equal(logits(model), before)


def delta_fusion(family, names, gate, *loras):
    """A fusion whose last experts are fine-tunes of a family, and the deltas that it holds open."""
    experts = (*loras, *(DeltaExpert(name, Delta.open(family.deltas[name])) for name in names))
    architecture = Architecture(family.model.config.model_type)
    return replace(make_fusion(count=1), experts=experts, gate=gate, architecture=architecture)


@pytest.mark.parametrize("name", FAMILIES)
def test_deltas_as_experts(tmp_path, name):
    """Against the layers' dense deltas, weighed by hand in float64."""
    family = Family.make(tmp_path, name)
    family.add("one", seed=1)
    family.add("two", seed=2)
    generator = np.random.default_rng(0)
    lora, gate = make_lora(generator, 3, list(SHAPES)[:3]), make_gate(generator, 3)
    fusion = delta_fusion(family, ["one", "two"], gate, lora)
    base = logits(family.model)
    with attach(family.model, fusion, accept_base=True):
        found = logits(family.model)

    dense = copy.deepcopy(family.model).double()
    seen = {}

    def remember(block):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            own = gate.blocks[block]
            w, b = (torch.tensor(array.to_float32()).double() for array in (own.weight, own.bias))
            seen[block] = torch.softmax(x @ w.T / gate.temperature, -1) + b

        return hook

    def add(module_name):
        block = ".".join(module_name.split(".")[:3])
        changes = [(0, lora.modules[module_name])] if module_name in lora.modules else []
        matrices = [(i, m.scale * m.b.to_float32() @ m.a.to_float32()) for i, m in changes]
        deltas = enumerate(fusion.experts[1:], start=1)
        matrices += [(i, expert.delta.dequantize(f"{module_name}.weight")) for i, expert in deltas]

        def hook(module, args, y):
            for index, matrix in matrices:
                y = y + seen[block][..., index : index + 1] * (args[0] @ torch.tensor(matrix).double().T)
            return y

        return hook

    for block in gate.blocks:
        dense.get_submodule(block).register_forward_pre_hook(remember(block), with_kwargs=True)
    for module_name, module in dense.named_modules():
        if module_name.endswith("_proj"):
            module.register_forward_hook(add(module_name))
    expected = logits(dense)
    assert (found - expected).norm() < 1e-4 * expected.norm() < 1e-2 * (expected - base).norm()


def test_one_delta_with_weight_one_changes_what_its_projections_change(tmp_path):
    family = Family.make(tmp_path)
    family.add("one", embeddings=False)
    fusion = delta_fusion(family, ["one"], FixedGate((1.0,)))
    with attach(family.model, fusion, accept_base=True):
        found = logits(family.model)
    tuned = copy.deepcopy(family.model)
    with torch.no_grad(), Delta.open(family.deltas["one"]) as delta:
        for name in delta.names:
            if name.endswith("_proj.weight"):
                tuned.get_parameter(name).add_(torch.tensor(delta.dequantize(name)))
    torch.testing.assert_close(found, logits(tuned), atol=1e-4, rtol=1e-4)


def test_a_fusion_over_a_delta(tmp_path):
    """The fine-tune whose layers have the LoRA added, as PEFT's merge would have it."""
    family = Family.make(tmp_path)
    family.add("one", seed=1)
    lora = make_lora(np.random.default_rng(0), 4)
    with Delta.open(family.deltas["one"]) as delta, attach(family.model, delta):
        alone = logits(family.model)
        with attach(family.model, single(lora), accept_base=True):
            both = logits(family.model)
        assert torch.equal(logits(family.model), alone)
    tuned = load(apply(family.base, family.deltas["one"], tmp_path / "dense"))
    with torch.no_grad():
        for name, matrix in lora.modules.items():
            change = matrix.scale * matrix.b.to_float32() @ matrix.a.to_float32()
            tuned.get_submodule(name).weight.add_(torch.tensor(change))
    torch.testing.assert_close(both, logits(tuned), atol=1e-3, rtol=1e-3)
    assert (both - alone).norm() > 0.05 * alone.norm()


def test_a_delta_that_cannot_be_mixed(tmp_path):
    family = Family.make(tmp_path, hidden=128)
    base, tuned = family.base, perturbed(family.base, tmp_path / "tuned")
    path = compress_bitdelta(base, tuned, tmp_path / "signs.safetensors", BitDeltaOptions("none"))
    family.deltas["signs"] = path
    with pytest.raises(AttachError, match=r"q_proj\.weight is dense, an expert of a fusion needs factored"):
        attach(family.model, delta_fusion(family, ["signs"], FixedGate((1.0,))), accept_base=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(model, dtype):
    fusion = make_fusion(count=3)
    with attach_fusion(model, fusion, accept_base=True):
        expected = logits(model)
    base = logits(model)
    model.to(dtype)
    with attach_fusion(model, fusion, accept_base=True):
        found = logits(model)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < 0.05 * (expected - base).norm()


def test_nothing_to_compare_is_no_base(model):
    fusion = make_fusion(count=2)
    other = replace(fusion.base, tensors={"other": TensorIdentity("ab" * 32, "F32", (64,))})
    with pytest.raises(AttachError, match="nor any other one of the base that"):
        attach_fusion(model, replace(fusion, base=other))
