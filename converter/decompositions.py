# SPDX-License-Identifier: Apache-2.0
"""Singular vectors kept on disk, so that a projection is decomposed once however often it is compressed.

Choosing bits needs all singular triplets of all projections before the first is quantized, and a search for a quality
compresses more than once. What costs is the eigenproblem; of its result the shorter side's vectors are kept, from
which one product gives the rest. Pages of files are no process's memory, so the memory of a run stays that of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from deltaweave.converter.errors import OutputError
from deltaweave.converter.svd import Factors, factors_of, short_vectors

__all__ = ["Decompositions"]

# How far a kept vector's length may be from 1. One that reached the disk as a name only, before the power failed, is 0.
UNIT = 1e-3
# Bytes before the vectors: their number.
COUNT = 8


class Decompositions:
    """The singular triplets of named matrices."""

    def __init__(self, folder: Path | None, write: Callable[[Callable[[], None]], None]) -> None:
        """Keeps vectors in `folder`, None keeps none; `write` runs what writes them, now or later."""
        self.folder, self._write = folder, write

    def factors(self, name: str, delta: torch.Tensor, rank: int) -> Factors:
        """`truncated_svd` of the matrix called `name`.

        Args:
            name: a tensor's name.
            delta: [out_features, in_features] float32; the same for the same name.
            rank: triplets wanted.
        """
        if self.folder is None:
            return factors_of(delta, short_vectors(delta, rank))
        path = self.folder / f"vectors-{name}.bin"
        kept = _load(path, min(delta.shape), rank)
        if kept is not None:
            return factors_of(delta, kept.to(delta.device))
        short = short_vectors(delta, min(delta.shape))
        if short.is_cuda:  # they are written from another thread's stream
            torch.cuda.current_stream(short.device).synchronize()
        self._write(partial(_save, path, short))
        return factors_of(delta, short[:rank])


def _load(path: Path, length: int, rank: int) -> torch.Tensor | None:
    """The first vectors [rank or fewer, length] float32, None if they are not there or not whole."""
    if not path.is_file() or path.stat().st_size < COUNT:
        return None
    count = int(np.fromfile(path, np.int64, 1)[0])
    if COUNT + 4 * count * length != path.stat().st_size:
        return None
    values = torch.from_numpy(np.fromfile(path, np.float32, min(rank, count) * length, offset=COUNT)).view(-1, length)
    return values if bool(((values.norm(dim=1) - 1).abs() < UNIT).all()) else None


def _save(path: Path, vectors: torch.Tensor) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(vectors).to_bytes(COUNT, "little"))
            file.write(vectors.cpu().numpy().data)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
