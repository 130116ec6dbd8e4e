# SPDX-License-Identifier: Apache-2.0
"""The Gram-matrix SVD against torch.linalg.svd in float64."""

import pytest
import torch
from deltaweave.converter.svd import truncated_svd
from hypothesis import given, settings
from hypothesis import strategies as st


def matrix(out_features, in_features, decay, seed=0):
    """A matrix with singular values 1, decay, decay^2, ..."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(out_features, in_features)
    u = torch.linalg.qr(torch.randn(out_features, rank, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(in_features, rank, generator=generator, dtype=torch.float64))[0]
    sigma = decay ** torch.arange(rank, dtype=torch.float64)
    return (u * sigma @ v.T).float()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.8, 1.0), st.integers(0, 9))
def test_agrees_with_lapack(out_features, in_features, decay, seed):
    delta = matrix(out_features, in_features, decay, seed)
    rank = max(1, min(out_features, in_features) // 2)
    factors = truncated_svd(delta, rank)
    u, sigma, v = torch.linalg.svd(delta.double(), full_matrices=False)
    assert torch.allclose(factors.sigma.double(), sigma[: factors.rank], rtol=1e-5, atol=1e-6)
    # Equal singular values leave the vectors free, so compare the best approximation's error instead.
    best = (u[:, :rank] * sigma[:rank]) @ v[:rank]
    ours = (factors.u.double() * factors.sigma.double()) @ factors.v.double()
    assert (delta.double() - ours).norm() <= (delta.double() - best).norm() + 1e-5 * sigma[0]


def test_factors_are_orthonormal_and_complete():
    delta = matrix(96, 64, 0.9)
    factors = truncated_svd(delta, 64)
    assert torch.allclose(factors.u.T @ factors.u, torch.eye(factors.rank), atol=1e-4)
    assert torch.allclose(factors.v @ factors.v.T, torch.eye(factors.rank), atol=1e-4)
    assert torch.allclose(factors.u @ factors.sigma.diag() @ factors.v, delta, atol=1e-6)
    assert factors.energy == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_sign_is_fixed(shape):
    delta = matrix(*shape, 0.9)
    once, negated = truncated_svd(delta, 8), truncated_svd(-delta, 8)
    short = once.u if shape[0] < shape[1] else once.v.T
    assert torch.equal(short.gather(0, short.abs().argmax(0, keepdim=True)).sign(), torch.ones(1, 8))
    assert torch.allclose(
        once.u @ once.sigma.diag() @ once.v,
        -(negated.u @ negated.sigma.diag() @ negated.v),
        atol=1e-6,
    )


def test_zero_delta_has_rank_zero():
    factors = truncated_svd(torch.zeros(8, 6), 4)
    assert (factors.rank, factors.u.shape, factors.v.shape) == (0, (8, 0), (0, 6))


def test_low_rank_delta_keeps_its_rank():
    delta = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 7.0))
    assert truncated_svd(delta, 4).rank == 1


def test_tail_far_below_the_leading_value_is_exact_to_float32():
    delta = matrix(80, 80, 0.85)  # the last value is 3e-6 of the first
    sigma = torch.linalg.svdvals(delta.double())
    kept = truncated_svd(delta, 80).sigma.double()
    assert ((kept - sigma[: len(kept)]).abs() / sigma[0]).max() < 1e-7
