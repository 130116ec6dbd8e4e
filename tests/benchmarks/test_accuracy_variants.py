# SPDX-License-Identifier: Apache-2.0
"""Variants of the method on a tiny pair: bytes as asked for, and errors as the laboratory's parts promise."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "accuracy"))
from variants import PRESET, Matrix, Variant, _decomposed, compressed


@pytest.fixture
def matrices():
    generator = torch.Generator().manual_seed(0)

    def moment(size):
        root = torch.randn(2 * size, size, generator=generator) * torch.linspace(0.1, 2, size)
        return root.T @ root / len(root)

    def matrix(out_features, in_features):
        u, v = (torch.randn(12, size, generator=generator) for size in (out_features, in_features))
        return Matrix(u.T @ v / 12, moment(in_features), moment(out_features))

    return {"wide": matrix(96, 160), "tall": matrix(160, 64)}


@pytest.mark.parametrize(
    "variant",
    [
        PRESET,
        Variant(ratio=1 / 4),
        Variant(ratio=1 / 4, decomposition="two-sided", relief=0.1),
        Variant(ratio=1 / 4, decomposition="two-sided", unbiased=True),
    ],
)
def test_a_variant_keeps_its_bytes_and_most_of_the_output(matrices, variant):
    variant = Variant(**{**vars(variant), "ratio": 1 / 2})
    approximations, stored = compressed(matrices, variant)
    assert 0 < stored <= sum(matrix.delta.numel() for matrix in matrices.values())
    for name, matrix in matrices.items():
        error = matrix.delta - approximations[name]
        assert cost(error, matrix) < 0.05 * cost(matrix.delta, matrix)


def test_two_sided_factors_are_the_delta_and_the_best_of_it(matrices):
    for matrix in matrices.values():
        whole = _decomposed(matrix, matrix.outputs, "two-sided")
        assert torch.allclose((whole.u * whole.sigma) @ whole.v, matrix.delta, atol=1e-4)
        plain = _decomposed(matrix, matrix.outputs, "plain")
        leading = [factors.select(range(6)) for factors in (whole, plain)]
        errors = [matrix.delta - (part.u * part.sigma) @ part.v for part in leading]
        assert cost(errors[0], matrix) < cost(errors[1], matrix)


def cost(delta, matrix):
    """tr(G delta H delta^T)."""
    return float(((matrix.outputs @ delta @ matrix.inputs) * delta).sum())
