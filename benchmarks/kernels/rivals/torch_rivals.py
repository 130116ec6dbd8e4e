# SPDX-License-Identifier: Apache-2.0
"""PyTorch: the base product, a merged model a tenant, and bf16 factors by a loop over tenants or by bmm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cases import Case
from .workload import Workload, normal

__all__ = ["Base", "MergedBmm", "MergedLoop", "TorchBmm", "TorchLoop", "padded_rank", "scattered"]

RANK_MULTIPLE = 64  # a rank of 1002 would leave every second row unaligned: the rivals get the next multiple


def padded_rank(rank: int) -> int:
    """The rank that a bf16 contender stores, the surplus being zeros."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def scattered(case: Case) -> str | None:
    """Why the rows of a tenant cannot be one slice of x, or None: one token a tenant or one tenant are wanted."""
    if case.tenants not in (1, case.tokens):
        return f"{case.tokens} tokens of {case.tenants} tenants lie scattered"
    return None


class Base(Workload):
    """The base model's own product by cuBLAS, for the ratios."""

    name = "base"
    label = "base model (cuBLAS)"
    accumulates = False

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        features = case.group.in_features
        self.weight = normal((layers, case.group.out_features, features), features**-0.5, device)

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """One bf16 matrix."""
        return 2 * case.group.out_features * case.group.in_features

    def outputs(self) -> list[torch.Tensor]:
        """One tensor for all slices."""
        return [self.zeros(self.case.tokens, self.case.group.out_features)]

    def launch(self, layer: int) -> None:
        """One torch.mm."""
        torch.mm(self.x, self.weight[layer].T, out=self.y[0])

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """The same in float64."""
        return self.x[list(rows)].double() @ self.weight[layer].double().T


class MergedLoop(Workload):
    """A model of its own for every tenant: base and delta merged into one bf16 matrix; a loop of cuBLAS products."""

    name = "merged-loop"
    label = "merged models, loop"
    accumulates = False

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        features = case.group.in_features
        shape = (layers, case.tenants, case.group.out_features, features)
        self.weight = normal(shape, features**-0.5, device)
        self.rows = self.tenant_rows()

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One token a tenant."""
        return "prefill of one tenant: the base's own product" if case.tokens != case.tenants else None

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """A bf16 matrix a tenant."""
        return 2 * case.tenants * case.group.out_features * case.group.in_features

    def outputs(self) -> list[torch.Tensor]:
        """One tensor for all slices."""
        return [self.zeros(self.case.tokens, self.case.group.out_features)]

    def launch(self, layer: int) -> None:
        """y_t = x_t W_t^T for every tenant."""
        for tenant, rows in enumerate(self.rows):
            torch.mm(self.x[rows], self.weight[layer, tenant].T, out=self.y[0][rows])

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """Row by row with the tenant's matrix."""
        tenants = self.case.tenants
        return torch.cat(
            [self.x[row : row + 1].double() @ self.weight[layer, row % tenants].double().T for row in rows]
        )


class MergedBmm(MergedLoop):
    """The same matrices in one batched product."""

    name = "merged-bmm"
    label = "merged models, bmm"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One tenant is the loop's case."""
        return "one tenant: the same as the loop" if case.tenants == 1 else super().refuses(case)

    def launch(self, layer: int) -> None:
        """One torch.bmm."""
        torch.bmm(self.x.unsqueeze(1), self.weight[layer].transpose(1, 2), out=self.y[0].unsqueeze(1))


class TorchLoop(Workload):
    """bf16 factors, sigma folded into the first; the first products of a fused group as one."""

    name = "torch-loop"
    label = "PyTorch loop, bf16 factors"

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        super().__init__(case, layers, device)
        group = case.group
        ranks = [padded_rank(piece.rank) for piece in group.slices]
        starts = [sum(ranks[:place]) for place in range(len(ranks))]
        self.spans = [slice(start, start + rank) for start, rank in zip(starts, ranks, strict=True)]
        self.first = normal((layers, case.tenants, sum(ranks), group.in_features), group.in_features**-0.5, device)
        self.second = []
        for piece, span in zip(group.slices, self.spans, strict=True):
            self.first[:, :, span.start + piece.rank : span.stop] = 0
            shape = (layers, case.tenants, piece.out_features, span.stop - span.start)
            self.second.append(normal(shape, piece.rank**-0.5, device))
        self.h = self.zeros(case.tokens, sum(ranks))
        self.rows = self.tenant_rows()

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One token a tenant, or one tenant."""
        return scattered(case)

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """bf16 factors of padded rank."""
        features = case.group.in_features
        return 2 * case.tenants * sum(padded_rank(s.rank) * (features + s.out_features) for s in case.group.slices)

    def launch(self, layer: int) -> None:
        """h_t = x_t A_t^T; y_t += h_t B_t^T for every slice."""
        for tenant, rows in enumerate(self.rows):
            torch.mm(self.x[rows], self.first[layer, tenant].T, out=self.h[rows])
            for y, span, second in zip(self.y, self.spans, self.second, strict=True):
                y[rows].addmm_(self.h[rows, span], second[layer, tenant].T)

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """Row by row with the tenant's factors."""
        values = []
        for row in rows:
            tenant = row % self.case.tenants
            h = self.x[row : row + 1].double() @ self.first[layer, tenant].double().T
            pieces = zip(self.spans, self.second, strict=True)
            values.append(torch.cat([h[:, span] @ second[layer, tenant].double().T for span, second in pieces], dim=1))
        return torch.cat(values)


class TorchBmm(TorchLoop):
    """The same factors by torch.bmm over tenants."""

    name = "torch-bmm"
    label = "PyTorch bmm, bf16 factors"

    @classmethod
    def refuses(cls, case: Case) -> str | None:
        """One tenant is the loop's case."""
        return "one tenant: the same as the loop" if case.tenants == 1 else super().refuses(case)

    def launch(self, layer: int) -> None:
        """One bmm for the first factors, one a slice for the second."""
        torch.bmm(self.x.unsqueeze(1), self.first[layer].transpose(1, 2), out=self.h.unsqueeze(1))
        for y, span, second in zip(self.y, self.spans, self.second, strict=True):
            y.unsqueeze(1).baddbmm_(self.h[:, span].unsqueeze(1), second[layer].transpose(1, 2))
