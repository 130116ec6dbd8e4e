# SPDX-License-Identifier: Apache-2.0
"""How fast an engine answers: time to first token, time between tokens, tokens a second."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.requests import Request
from deltaweave.runtime_plugin.trt.engine import Engine

__all__ = ["Measurement", "bench_engine"]


@dataclass(frozen=True)
class Measurement:
    """What one batch of equal requests took; the first of its shapes was not measured.

    Attributes:
        batch: requests at a time.
        tenants: fine-tunes among them, in turn; 0 is the bare base.
        first_token_ms: from the request to its first token, the median over requests (prompts are gone through one
            after the other).
        token_ms: between a request's tokens, in percent of all: 50, 90, 99.
        tokens_per_second: new tokens of all requests, over the time from their first to their last token.
    """

    batch: int
    tenants: int
    first_token_ms: float
    token_ms: dict[str, float]
    tokens_per_second: float


def bench_engine(
    folder: str | Path,
    tenants: Mapping[str, str | Path],
    *,
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    accept_base: bool = False,
    seed: int = 0,
) -> list[Measurement]:
    """Measures every batch size with the bare base, with one fine-tune and with all of them.

    Args:
        folder: that `deltaweave build` wrote.
        tenants: delta files by name.
        batches: numbers of requests at a time.
        prompt_tokens: of each request, drawn at random.
        new_tokens: of each, at least 2; no stop token ends it sooner.
        accept_base: take deltas of another base.
        seed: of the prompts.

    Raises:
        DeltaweaveError: an engine that does not fit this machine or these sizes.
    """
    if new_tokens < 2:
        raise DeltaweaveError(f"--new-tokens {new_tokens}: expected at least 2")
    with Engine(folder) as engine:
        for name, path in tenants.items():
            engine.add(path, name, accept_base=accept_base)
        too_large = [batch for batch in batches if batch > engine.max_batch]
        if too_large:
            raise DeltaweaveError(f"--batch {too_large[0]}: the engine was built for at most {engine.max_batch}")
        generator = np.random.default_rng(seed)
        found = []
        for batch in batches:
            for count in sorted({0, min(1, len(tenants)), len(tenants)}):
                names: list[str | None] = [*list(tenants)[:count]] or [None]
                requests = [
                    Request(
                        generator.integers(0, engine.graph.base_vocabulary, prompt_tokens).tolist(),
                        names[row % len(names)],
                        new_tokens,
                    )
                    for row in range(batch)
                ]
                engine.run(requests)
                found.append(_measure(engine, requests, count))
    return found


def _measure(engine: Engine, requests: Sequence[Request], tenants: int) -> Measurement:
    times: list[list[float]] = [[] for _ in requests]
    start = time.perf_counter()
    engine.run(requests, lambda index, token: times[index].append(time.perf_counter()))
    gaps = np.concatenate([np.diff(each) for each in times]) * 1e3
    first = [each[0] for each in times]
    last = max(each[-1] for each in times)
    return Measurement(
        batch=len(requests),
        tenants=tenants,
        first_token_ms=float(np.median(first) - start) * 1e3,
        token_ms={str(percent): float(np.percentile(gaps, percent)) for percent in (50, 90, 99)},
        tokens_per_second=sum(map(len, times)) / (last - start),
    )
