# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoint folders, read lazily: a tensor costs page cache until it is used, never anonymous memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter.errors import CheckpointError
from deltaweave.formats import (
    BaseIdentity,
    Container,
    ExactDtype,
    TensorIdentity,
    root_digest,
    sampled_fingerprint,
    tensor_digest,
)
from safetensors import SafetensorError, safe_open

__all__ = ["Checkpoint", "require_finite"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
STORED_NAMES: dict[torch.dtype, ExactDtype] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HASHING_THREADS = min(8, os.cpu_count() or 1)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """One model folder: its configuration and its tensors by name.

    Attributes:
        folder: the folder as given.
        config: the parsed `config.json`.
        files: for each tensor name the shard that holds it.
    """

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Opens a folder with `config.json` and safetensors weights, single-file or sharded.

        Raises:
            CheckpointError: no folder, no config, no safetensors weights, a shard that is missing or damaged, or a
                tensor that the index promises and no shard holds.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder with a Hugging Face checkpoint")
        config = _read_json(folder / "config.json")
        files = _tensor_files(folder)
        if not files:
            raise CheckpointError(f"{folder}: holds no tensors")
        return cls(folder, config, files)

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {file: _open_shard(file) for file in sorted(set(self.files.values()))}

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, read from its shard's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of one tensor.

        Raises:
            CheckpointError: a dtype other than float32, float16 and bfloat16.
        """
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            expected = ", ".join(sorted(DTYPES))
            raise CheckpointError(f"{self.files[name]}: {name} has dtype {stored}, expected one of {expected}")
        return DTYPES[stored]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, backed by the mapped file; not to be written to."""
        self.dtype(name)
        tensor: torch.Tensor = self._handles[self.files[name]].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a matrix, for matrices too large to convert whole."""
        rows: torch.Tensor = self._slice(name)[start:stop]
        return rows

    def resolve(self, name: str) -> str | None:
        """The stored tensor that plays the part of `name`: itself, the one it is tied to, or none."""
        name = self.tied.get(name, name)
        return name if name in self.files else None

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that share another one's storage: alias to owner."""
        return {HEAD: EMBEDDING} if self.config.get("tie_word_embeddings") else {}

    @property
    def display_name(self) -> str:
        """What the checkpoint calls itself, else its folder's name."""
        return str(self.config.get("_name_or_path") or self.folder.resolve().name)

    @property
    def model_type(self) -> str:
        """The architecture's name as `config.json` has it."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, aliases not counted."""
        sizes = {"F32": 4, "F16": 2, "BF16": 2}
        total = 0
        for name in self.names:
            if name not in self.tied:
                piece = self._slice(name)
                total += sizes.get(piece.get_dtype(), 1) * torch.Size(piece.get_shape()).numel()
        return total

    def identity(self, progress: Callable[[int, int], None] | None = None) -> BaseIdentity:
        """SHA-256 of every tensor and their root, as `formats/SPEC.md` defines them; reads the whole checkpoint.

        Args:
            progress: called with (tensors done, tensors in all).
        """
        containers = self._containers()

        def digest(name: str) -> TensorIdentity:
            container = containers[self.files[name]]
            entry = container.tensors[name]
            return TensorIdentity(tensor_digest(container.raw(name)), entry.dtype, tuple(entry.shape))

        tensors: dict[str, TensorIdentity] = {}
        with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing leaves the interpreter to others
            for done, (name, identity) in enumerate(zip(self.names, pool.map(digest, self.names), strict=True)):
                tensors[name] = identity
                if progress:
                    progress(done + 1, len(self.files))
        return BaseIdentity(
            name=self.display_name,
            revision=self.config.get("_commit_hash"),
            license=self.license,
            root=root_digest(tensors),
            fingerprint=self.fingerprint(),
            tensors=tensors,
        )

    def fingerprint(self) -> str:
        """The sampled fingerprint of `formats/SPEC.md`: a few bytes of every tensor, read in milliseconds."""
        containers = self._containers()
        return sampled_fingerprint({name: containers[self.files[name]].raw(name) for name in self.names})

    def _containers(self) -> Mapping[Path, Container]:
        return {file: Container.open(file) for file in set(self.files.values())}

    @property
    def license(self) -> str | None:
        """The licence that the folder's model card states in its front matter, if any."""
        card = self.folder / "README.md"
        if not card.is_file():
            return None
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines or lines[0].strip() != "---":
            return None
        for line in lines[1:]:
            if line.strip() == "---":
                break
            key, _, value = line.partition(":")
            if key.strip() == "license":
                return value.strip().strip("\"'") or None
        return None

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise CheckpointError(f"{self.folder}: has no tensor {name}")
        return self._handles[self.files[name]].get_slice(name)


def require_finite(tensor: torch.Tensor, name: str, where: Path) -> torch.Tensor:
    """Returns `tensor`, or raises CheckpointError naming it if a value is NaN or infinite."""
    # The sum of a finite tensor may overflow, so a suspicious sum is only the reason to look closer.
    if not torch.isfinite(tensor.float().sum()) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{where}: {name} has {bad} NaN or infinite values")
    return tensor


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(folder, index)
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise CheckpointError(
            f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE} (only safetensors weights are read)"
        )
    return dict.fromkeys(_open_shard(single).keys(), single)


def _indexed_files(folder: Path, index: Path) -> dict[str, Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: shard name {file!r} is not a plain file name")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: shard {file} is missing ({index.name} lists it)")
        held = set(_open_shard(folder / file).keys())
        for name in (name for name, owner in weight_map.items() if owner == file):
            if name not in held:
                raise CheckpointError(f"{folder / file}: has no tensor {name} ({index.name} lists it)")
    return {name: folder / file for name, file in weight_map.items()}


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected an object")
    return content
