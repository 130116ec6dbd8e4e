# SPDX-License-Identifier: Apache-2.0
"""What a gate weighs: LoRAs from PEFT folders and fusion files, and compressed fine-tunes, all as pairs of factors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaweave.converter.lora import read_peft_lora
from deltaweave.formats import BaseIdentity, Delta, DeltaweaveError, ExactArray, FactoredRecord
from deltaweave.formats.container import Container
from deltaweave.formats.fusion import DeltaExpert, DeltaReference, Fusion, Lora, LoraMatrix, LoraReference
from deltaweave.formats.fusion_file import FUSION_NAME, fusion_digest, resolve_fusion
from deltaweave.formats.header import FORMAT_NAME

__all__ = ["Expert", "GateError", "delta_as_lora", "fusion_experts", "open_experts"]

PROJECTION = "_proj.weight"
BLOCKS = "model.layers."


class GateError(DeltaweaveError):
    """An expert, example or option that a gate cannot be trained with."""


@dataclass(frozen=True)
class Expert:
    """One of the k that a gate weighs.

    Attributes:
        stored: as the fusion file will have it.
        lora: what it adds to each linear layer; of a delta, its factors, unpacked.
    """

    stored: Lora | LoraReference | DeltaReference
    lora: Lora

    def digest(self) -> str:
        """SHA-256 over every matrix: whether an interrupted training goes on with the same expert."""
        state = hashlib.sha256()
        for name, matrix in self.lora.modules.items():
            state.update(f"{name} {matrix.scale!r} {matrix.a.dtype} {matrix.shape} {matrix.rank}\n".encode())
            for array in (matrix.a.data, matrix.b.data):
                state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()


def open_experts(
    paths: Sequence[str | Path], base: BaseIdentity, folder: Path, *, reference: bool = False
) -> list[Expert]:
    """Opens experts of one base.

    Args:
        paths: PEFT folders, fusion files that hold one LoRA, and delta files.
        base: what they must belong to; a PEFT folder does not say, its shapes are checked when it is attached.
        folder: where the fusion file will lie.
        reference: name LoRA files in the fusion instead of copying them into it. Deltas are always named.

    Raises:
        DeltaweaveError: a path that is none of these; an expert of another base; two of one name; a file to be named
            that does not lie in `folder`.
    """
    experts = [_open(Path(path), base, folder, reference) for path in paths]
    names = [expert.lora.name for expert in experts]
    for name in names:
        if names.count(name) > 1:
            raise GateError(f"two experts are called {name}: rename the folder or file of one")
    return experts


def fusion_experts(path: str | Path) -> tuple[Fusion, list[Lora]]:
    """A fusion and what each of its experts adds, deltas unpacked to factors, for code that computes with torch.

    Raises:
        DeltaweaveError: a file, or one that it names, that is missing, damaged or another than was meant.
    """
    fusion = resolve_fusion(path)
    found = []
    for expert in fusion.experts:
        if isinstance(expert, DeltaExpert):
            with expert.delta:
                found.append(delta_as_lora(expert.delta, expert.name))
        elif isinstance(expert, Lora):
            found.append(expert)
    return fusion, found


def delta_as_lora(delta: Delta, name: str) -> Lora:
    """A delta's projections as a LoRA of scale 1: A = V, B = U^T diag(sigma), in float32.

    Its norms, biases, embeddings and lm_head have no part in a fusion: the base's stand.

    Raises:
        GateError: a projection that is not factored (BitDelta's), or none that is.
    """
    modules = {}
    for parameter, record in delta.records():
        if not (parameter.startswith(BLOCKS) and parameter.endswith(PROJECTION)):
            continue
        if not isinstance(record, FactoredRecord):
            kind = type(record).__name__.removesuffix("Record").lower()
            raise GateError(f"{delta.path}: {parameter} is {kind}, expected a factored delta")
        u, sigma, v = record.factors()
        modules[parameter.removesuffix(".weight")] = LoraMatrix(
            ExactArray(np.ascontiguousarray(v, np.float32), "F32"),
            ExactArray(np.ascontiguousarray((u * sigma[:, None]).T, np.float32), "F32"),
            1.0,
        )
    if not modules:
        raise GateError(f"{delta.path}: has no projections to mix")
    return Lora(name, None, modules)


def _open(path: Path, base: BaseIdentity, folder: Path, reference: bool) -> Expert:
    if path.is_dir():
        if reference:
            raise GateError(f"{path}: a PEFT folder cannot be named by a fusion; leave out --reference")
        lora = read_peft_lora(path)
        return Expert(lora, lora)
    kind = Container.open(path).metadata.get("format")
    if kind == FORMAT_NAME:
        return _open_delta(path, base, folder)
    if kind == FUSION_NAME:
        return _open_fusion(path, base, folder, reference)
    raise GateError(f"{path}: neither a PEFT folder, nor a fusion of one LoRA, nor a delta")


def _open_fusion(path: Path, base: BaseIdentity, folder: Path, reference: bool) -> Expert:
    fusion = resolve_fusion(path)
    if fusion.base.root != base.root:
        raise GateError(f"{path}: LoRA of base {fusion.base.name}, root {fusion.base.root[:12]}, expected {base.name}")
    if len(fusion.loras) != 1 or len(fusion.experts) != 1:
        raise GateError(f"{path}: fusion of {len(fusion.experts)} experts, expected one LoRA")
    lora = fusion.loras[0]
    if not reference:
        return Expert(lora, lora)
    _require_beside(path, folder)
    return Expert(LoraReference(lora.name, path.name, fusion_digest(path)), lora)


def _require_beside(path: Path, folder: Path) -> None:
    if path.resolve().parent != folder.resolve():
        raise GateError(f"{path}: a fusion names files beside itself; put this one into {folder}")


def _open_delta(path: Path, base: BaseIdentity, folder: Path) -> Expert:
    with Delta.open(path) as delta:
        if delta.header.base.root != base.root:
            theirs = delta.header.base
            raise GateError(f"{path}: delta over {theirs.name}, root {theirs.root[:12]}, expected {base.name}")
        _require_beside(path, folder)
        lora = delta_as_lora(delta, path.name.removesuffix(".safetensors"))
        return Expert(DeltaReference(lora.name, path.name, delta.header_sha256), lora)
