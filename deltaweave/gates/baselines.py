# SPDX-License-Identifier: Apache-2.0
"""Fusions without a gate: one expert, the average, and LoRA-Hub's weights, learnt for the task without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cma  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deltaweave.converter import Progress
from deltaweave.formats.fusion import Lora
from deltaweave.gates.examples import ExampleSet
from deltaweave.gates.experts import GateError
from deltaweave.gates.mixture import FixedWeights, attach_mixture
from deltaweave.gates.training import evaluate_loss

__all__ = ["HubRecipe", "HubSearch", "average_weights", "search_weights", "single_weights"]


@dataclass(frozen=True)
class HubRecipe:
    """How LoRA-Hub's weights are searched.

    Attributes:
        evaluations: of the loss over all examples, at most.
        l1: factor of the mean absolute weight that is added to the loss; 0.05 as published.
        bound: largest absolute weight; 1.5 as published.
        sigma: first step of the search (CMA-ES).
        seed: of the search.
        batch_size: examples a forward.
    """

    evaluations: int = 40
    l1: float = 0.05
    bound: float = 1.5
    sigma: float = 0.5
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True)
class HubSearch:
    """What a search found.

    Attributes:
        weights: the best, one an expert.
        objective: loss plus penalty, theirs.
        history: (weights, objective) of every evaluation.
    """

    weights: tuple[float, ...]
    objective: float
    history: tuple[tuple[tuple[float, ...], float], ...]


def single_weights(experts: int, chosen: int) -> tuple[float, ...]:
    """1 for one expert, 0 for the others."""
    if not -experts <= chosen < experts:
        raise GateError(f"expert {chosen} of {experts}")
    return tuple(float(index == chosen % experts) for index in range(experts))


def average_weights(experts: int) -> tuple[float, ...]:
    """The same for every expert, 1 in all."""
    return (1.0 / experts,) * experts


def search_weights(
    model: nn.Module,
    loras: Sequence[Lora],
    examples: ExampleSet,
    recipe: HubRecipe,
    *,
    pad: int = 0,
    progress: Progress | None = None,
) -> HubSearch:
    """Searches one weight an expert by CMA-ES over the loss of the examples; the first guess is zero, as published.

    Raises:
        GateError: fewer than two experts.
    """
    if len(loras) < 2:
        raise GateError(f"{len(loras)} expert, weights need at least two")
    history: list[tuple[tuple[float, ...], float]] = []
    weigher = FixedWeights([0.0] * len(loras))

    def objective(values: NDArray[np.float64]) -> float:
        chosen = tuple(float(value) for value in values)
        weigher.weights.copy_(torch.tensor(chosen))
        loss = evaluate_loss(model, examples.examples, pad, recipe.batch_size)
        history.append((chosen, loss + recipe.l1 * sum(map(abs, chosen)) / len(chosen)))
        if progress:
            progress("searching weights", min(len(history), recipe.evaluations), recipe.evaluations)
        return history[-1][1]

    random = np.random.default_rng(recipe.seed)
    options = {
        "bounds": [-recipe.bound, recipe.bound],
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": np.nan,  # leaves numpy's global generator alone
        "verbose": -9,
    }
    with attach_mixture(model, loras, weigher):
        objective(np.zeros(len(loras)))
        search = cma.CMAEvolutionStrategy([0.0] * len(loras), recipe.sigma, options)
        while len(history) + search.popsize <= max(recipe.evaluations, 1 + search.popsize) and not search.stop():
            candidates = search.ask()
            search.tell(candidates, [objective(candidate) for candidate in candidates])
    weights, best = min(history, key=lambda entry: entry[1])
    return HubSearch(weights, best, tuple(history))
