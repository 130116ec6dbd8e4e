# SPDX-License-Identifier: Apache-2.0
"""What the compressions of one fine-tune share, whatever their ratio: singular vectors, and what each is worth."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.svd import short_vectors

__all__ = ["CompressionCache"]

# What of a recipe decides its tables; drift decides in which dtype the fine-tune is walked.
MEASURE = {"sensitivity", "widths", "group_size", "grid", "whiten", "correct_drift"}


class CompressionCache:
    """Singular vectors are kept in memory; tables in files, where other processes find them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._vectors: dict[tuple[Any, ...], torch.Tensor] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the converter looks here before it decomposes or measures."""
        decompositions: Any = importlib.import_module("deltaweave.converter.decompositions")
        measuring: Any = importlib.import_module("deltaweave.converter.measuring")
        measured = measuring.Measurement.tables
        decompositions.short_vectors = self._short_vectors
        measuring.Measurement.tables = lambda measurement: self._tables(measurement, measured, measuring.TABLES_FILE)
        try:
            yield
        finally:
            decompositions.short_vectors = short_vectors
            measuring.Measurement.tables = measured

    def _short_vectors(self, delta: torch.Tensor, rank: int) -> torch.Tensor:
        key = (*delta.shape, delta.double().sum().item(), delta.double().square().sum().item())
        if key not in self._vectors:
            self._vectors[key] = short_vectors(delta, min(delta.shape))
        return self._vectors[key][:rank]

    def _tables(self, measurement: Any, measured: Callable[[Any], Any], name: str) -> Any:
        """`Measurement.tables`, its file laid where it looks for one."""
        measure = measurement.recipe.model_dump_json(include=MEASURE)
        kept = self._folder / f"tables-{hashlib.sha256(measure.encode()).hexdigest()[:16]}.safetensors"
        if kept.is_file():
            shutil.copyfile(kept, measurement.workspace.folder / name)
            return measured(measurement)
        tables = measured(measurement)
        temporary = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(measurement.workspace.folder / name, temporary)
        temporary.replace(kept)
        return tables
