# SPDX-License-Identifier: Apache-2.0
"""The Gram-matrix SVD in float64 against torch.linalg.svd in float32; the truth is float64 LAPACK.

python benchmarks/svd_accuracy.py --output benchmarks/results/svd_accuracy.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.svd import truncated_svd

sys.path.insert(0, str(Path(__file__).parent))
from results_file import circumstances, write_result

SHAPES = [(576, 576), (1536, 576), (1536, 1536)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = [measure(shape) for shape in SHAPES]
    for row in rows:
        print(json.dumps(row))
    result = {
        **circumstances("cpu"),
        "rows": rows,
    }
    write_result(arguments.output, result)


def measure(shape: tuple[int, int]) -> dict[str, Any]:
    """Largest error of a singular value, relative to the largest one, and of the rank-r/8 approximation."""
    delta = spectrum_like_a_fine_tune(shape)
    rank = min(shape) // 8
    truth = torch.linalg.svd(delta.double(), full_matrices=False)
    ours, seconds = timed(lambda: truncated_svd(delta, rank))
    theirs, their_seconds = timed(lambda: torch.linalg.svd(delta, full_matrices=False))
    return {
        "shape": list(shape),
        "rank": rank,
        "gram": {"seconds": seconds, **errors(delta, truth, ours.u, ours.sigma, ours.v)},
        "torch_float32": {
            "seconds": their_seconds,
            **errors(delta, truth, theirs.U[:, :rank], theirs.S[:rank], theirs.Vh[:rank]),
        },
    }


def spectrum_like_a_fine_tune(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rank = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator))[0]
    return left * torch.arange(1, rank + 1) ** -0.6 @ right.T


def errors(delta: torch.Tensor, truth: Any, u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    best = truth.S[len(sigma) :].norm()
    found = (delta.double() - (u.double() * sigma.double()) @ v.double()).norm()
    return {
        "sigma_error": float((sigma.double() - truth.S[: len(sigma)]).abs().max() / truth.S[0]),
        "excess_error": float(found / best - 1),
    }


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the fastest of three runs, in seconds."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


if __name__ == "__main__":
    main()
