# SPDX-License-Identifier: Apache-2.0
"""A tiny base with fine-tunes and fusions of them, and what each computes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from deltaweave.converter import Checkpoint
from deltaweave.formats import Delta, DeltaExpert, FixedGate
from deltaweave.runtime_plugin.pytorch import attach
from family import Family
from fusions import SHAPES, make_fusion, make_gate, make_lora

__all__ = ["TOKENS", "alone", "filled", "greedy", "joined", "make"]

TOKENS = 3 + torch.arange(48).reshape(8, 6) % 50


def joined(family, order=("lora", "one", "lora"), gate=None, seed=5):
    """A fusion whose experts at `one` and `two` are those deltas; the LoRAs differ in rank and layers."""
    generator = np.random.default_rng(seed)
    experts = tuple(
        make_lora(generator, 2 + index, list(SHAPES)[index:], scale=0.2, name=f"lora{index}")
        if name == "lora"
        else DeltaExpert(name, Delta.open(family.deltas[name]))
        for index, name in enumerate(order)
    )
    gate = gate or make_gate(generator, len(order))
    return replace(make_fusion(base=family.identity), experts=experts, gate=gate)


def make(folder, name="llama"):
    made = Family.make(folder, name)
    for seed, delta in enumerate(("one", "two")):
        made.add(delta, seed=seed, added_tokens=seed)
    made.identity = Checkpoint.open(made.base).identity()
    architecture = replace(make_fusion().architecture, model_type=name)
    made.fusions = {
        "three": make_fusion(1, 3, base=made.identity),
        "eight": make_fusion(2, 8, base=made.identity),
        "fixed": make_fusion(3, 2, FixedGate((0.75, -0.5)), base=made.identity),
        "joined": joined(made),
        "deltas": joined(made, ("two", "one"), FixedGate((0.5, 0.5))),
    }
    made.fusions = {key: replace(fusion, architecture=architecture) for key, fusion in made.fusions.items()}
    made.expected = {key: alone(made, key, TOKENS) for key in (None, *made.deltas, *made.fusions)}
    return made


def filled(family, *names, **settings):
    arena = family.arena(**{"slots": 16, "capacity_bytes": 32 << 20, **settings})
    for name in names or family.fusions:
        arena.add(family.fusions[name], name)
    return arena


@torch.no_grad()
def alone(family, name, tokens):
    """From the reference, over the base's vocabulary."""
    if name not in family.fusions:
        return family.alone(name, tokens)
    with attach(family.model, family.fusions[name]):
        return family.alone(None, tokens)


def greedy(family, name, prompt, count):
    if name not in family.fusions:
        return family.greedy(name, prompt, count)
    with attach(family.model, family.fusions[name]):
        return family.greedy(None, prompt, count)
