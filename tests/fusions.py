# SPDX-License-Identifier: Apache-2.0
"""Small fusions made from a seed, shared by the tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from deltaweave.formats import Architecture, DeltaExpert, ExactArray
from deltaweave.formats.fusion import BlockGate, FixedGate, Fusion, Lora, LoraMatrix, TokenGate
from samples import exact, make_header

__all__ = ["SHAPES", "make_fusion", "make_gate", "make_lora", "random_fusions", "same", "single"]

SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.v_proj": (32, 64),
        "mlp.up_proj": (160, 64),
        "mlp.down_proj": (64, 160),
    }.items()
}


def make_lora(generator, rank, modules=SHAPES, dtype="BF16", scale=0.25, name="lora", shapes=SHAPES):
    matrices = {
        module: LoraMatrix(
            exact(generator, (rank, shapes[module][1]), dtype),
            exact(generator, (shapes[module][0], rank), dtype),
            scale,
        )
        for module in modules
    }
    return Lora(name, None, matrices)


def make_gate(generator, count, layers=2, hidden=64, dtype="F16", temperature=1.1):
    blocks = {
        f"model.layers.{layer}": BlockGate(exact(generator, (count, hidden), dtype), exact(generator, (count,), dtype))
        for layer in range(layers)
    }
    return TokenGate(blocks, temperature)


def make_fusion(seed=0, count=3, gate=None, base=None):
    """Ranks differ, and so do dtypes and target modules."""
    generator = np.random.default_rng(seed)
    names = list(SHAPES)
    loras = tuple(
        make_lora(
            generator,
            1 + 3 * index,
            names[index % 3 :],
            ("BF16", "F16", "F32")[index % 3],
            0.1 * (index + 1),
            f"lora{index}",
        )
        for index in range(count)
    )
    gate = gate or make_gate(generator, count)
    base = base or make_header().base
    return Fusion(
        "deltaweave 0.1.0", base, Architecture("llama"), {"name": "lora-flow"}, loras, gate, {"examples": 200}
    )


def random_fusions(model, delta, seed=0):
    """Of a Hugging Face model: LoRAs of unequal ranks that leave layers out, and the same around a delta."""
    generator = np.random.default_rng(seed)
    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if name.endswith("_proj.weight")
    }
    loras = [
        make_lora(generator, rank, list(shapes)[skipped:], scale=0.01, name=f"lora{rank}", shapes=shapes)
        for rank, skipped in ((4, 0), (24, 3), (9, 1))
    ]
    gate = make_gate(generator, 3, model.config.num_hidden_layers, model.config.hidden_size)
    architecture = Architecture(model.config.model_type)
    plain = replace(make_fusion(gate=gate), experts=tuple(loras), architecture=architecture)
    return {
        "loras": plain,
        "joined": replace(plain, experts=(loras[0], DeltaExpert("delta", delta), loras[2])),
    }


def single(lora, base=None):
    """A LoRA in a file of its own."""
    base = base or make_header().base
    return Fusion("deltaweave 0.1.0", base, Architecture("llama"), {"name": "lora"}, (lora,), FixedGate((1.0,)))


def same(one, other):
    """Whether two exact arrays are equal to the bit."""
    assert isinstance(one, ExactArray)
    return (
        one.dtype == other.dtype and one.data.shape == other.data.shape and one.data.tobytes() == other.data.tobytes()
    )
