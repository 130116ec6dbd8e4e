# SPDX-License-Identifier: Apache-2.0
"""Singular value decomposition of a delta through its Gram matrix in float64.

The squared condition number of a Gram matrix costs half the digits, so float64 leaves 8 of 16: relative to the largest
singular value, sigma is exact to about 1e-8, which is float32's own accuracy (`benchmarks/svd_accuracy.py` measures it
against `torch.linalg.svd`). The eigenproblem has the size of the shorter side only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Factors", "factors_of", "short_vectors", "truncated_svd", "whitened_svd"]

# Below this share of the largest singular value, a direction is rounding noise of the float64 Gram matrix.
NOISE_FLOOR = 1e-7
# Columns converted to float64 at a time: bounds the temporary at 64 MiB for a side of 16384.
CHUNK = 512
# Share of its mean diagonal that is added to a second moment before its root is taken: directions that were hardly seen
# must not become the largest.
WHITENING_DAMPING = 0.01


@dataclass(frozen=True)
class Factors:
    """The leading part of `delta = u @ diag(sigma) @ v`.

    Attributes:
        u: [out_features, rank] float32, orthonormal columns.
        sigma: [rank] float32, falling.
        v: [rank, in_features] float32, orthonormal rows.
        energy: share of the delta's squared Frobenius norm that these ranks hold, in [0, 1].
    """

    u: torch.Tensor
    sigma: torch.Tensor
    v: torch.Tensor
    energy: float

    @property
    def rank(self) -> int:
        """Number of singular values kept."""
        return self.sigma.numel()

    def select(self, order: Sequence[int]) -> Factors:
        """The triplets `order`, in that order; those that the delta does not have are left out."""
        chosen = torch.tensor([index for index in order if index < self.rank], dtype=torch.int64).to(self.sigma.device)
        sigma = self.sigma[chosen]
        kept = float(sigma.double().square().sum() / self.sigma.double().square().sum()) if len(chosen) else 0.0
        return Factors(self.u[:, chosen], sigma, self.v[chosen], self.energy * kept)


def truncated_svd(delta: torch.Tensor, rank: int) -> Factors:
    """The `rank` largest singular triplets of a delta, fewer if its numerical rank is lower.

    Args:
        delta: [out_features, in_features] float32, on any device.
        rank: number of triplets wanted.

    Returns:
        The factors; the largest entry of each pair's shorter vector is positive. Rank 0 for a delta of zeros.
    """
    return factors_of(delta, short_vectors(delta, rank))


def short_vectors(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The costly half of `truncated_svd`: the singular vectors of the delta's shorter side.

    Args:
        delta: [out_features, in_features] float32.
        rank: number of vectors wanted.

    Returns:
        [rank or fewer, shorter side] float32, by falling singular value.
    """
    tall = _tall(delta)
    if rank == 0 or not delta.any():
        return delta.new_empty(0, tall.shape[1])
    eigenvalues, eigenvectors = torch.linalg.eigh(_gram(tall))
    eigenvalues, short = eigenvalues.flip(0)[:rank], eigenvectors.flip(1)[:, :rank]
    keep = int((eigenvalues > eigenvalues[0] * NOISE_FLOOR**2).sum())
    short = short[:, :keep]
    sign = torch.gather(short, 0, short.abs().argmax(0, keepdim=True)).sign()
    vectors: torch.Tensor = (short * sign).T.float().contiguous()
    return vectors


def factors_of(delta: torch.Tensor, short: torch.Tensor) -> Factors:
    """The factors of a delta that belong to vectors of `short_vectors`, all or the first of them."""
    if not len(short):
        return _empty(delta)
    long, sigma = _long_side(_tall(delta), short.T.double())
    u, v = (long, short.T) if delta.shape[0] >= delta.shape[1] else (short.T, long)
    energy = min(1.0, float(sigma.double().square().sum()) / _squared_norm(delta))
    return Factors(u.contiguous(), sigma, v.T.contiguous(), energy)


def whitened_svd(delta: torch.Tensor, moment: torch.Tensor, rank: int) -> Factors:
    """The triplets that matter most to the output: those of `delta @ root`, the root being the input moment's.

    Args:
        delta: [out_features, in_features] float32.
        moment: [in_features, in_features] float32, the input's second moment up to a factor.
        rank: number of triplets wanted.

    Returns:
        Factors of `delta` whose v rows have unit length and are orthogonal in the metric of `moment`, not to each
        other; their order is by falling contribution to the output.
    """
    damped = moment.double()
    damped.diagonal().add_(WHITENING_DAMPING * damped.diagonal().mean())
    eigenvalues, vectors = torch.linalg.eigh(damped)
    roots = eigenvalues.clamp_min(0).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    factors = truncated_svd(delta @ root.float(), rank)
    v = factors.v @ inverse.float()
    lengths = v.norm(dim=1)
    return Factors(factors.u, factors.sigma * lengths, v / lengths[:, None], factors.energy)


def _tall(delta: torch.Tensor) -> torch.Tensor:
    return delta if delta.shape[0] >= delta.shape[1] else delta.T


def _squared_norm(delta: torch.Tensor) -> float:
    return float(sum(piece.double().square().sum() for piece in delta.split(CHUNK)))


def _gram(tall: torch.Tensor) -> torch.Tensor:
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for piece in tall.split(CHUNK):
        rows = piece.double()
        gram.addmm_(rows.T, rows)
    return gram


def _long_side(tall: torch.Tensor, short: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`tall @ short` split into unit columns and their norms, which are the singular values to full accuracy."""
    long = tall.new_empty(tall.shape[0], short.shape[1])
    squares = torch.zeros(short.shape[1], dtype=torch.float64, device=tall.device)
    for start in range(0, tall.shape[0], CHUNK):
        product = tall[start : start + CHUNK].double() @ short
        squares += product.square().sum(0)
        long[start : start + CHUNK] = product.float()
    sigma = squares.sqrt()
    return long / sigma.float(), sigma.float()


def _empty(delta: torch.Tensor) -> Factors:
    out_features, in_features = delta.shape
    return Factors(delta.new_zeros(out_features, 0), delta.new_zeros(0), delta.new_zeros(0, in_features), 1.0)
