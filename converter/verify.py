# SPDX-License-Identifier: Apache-2.0
"""Checks of a delta or fusion against its own checksums, its base, and the files and fine-tune it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deltaweave.converter.apply import tuned_names, tuned_tensor
from deltaweave.converter.checkpoint import Checkpoint
from deltaweave.converter.plan import Progress, silent
from deltaweave.formats import (
    BaseIdentity,
    Delta,
    DeltaReference,
    DeltaweaveError,
    FormatError,
    Fusion,
    LoraReference,
    is_fusion,
    read_fusion,
    resolve_expert,
    verify_fusion,
)

__all__ = ["Check", "verify"]

# A recorded error is a rounded sum over the same numbers, so it must be met closely.
ERROR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was checked.
        passed: whether it holds.
        detail: what was found, in one line.
    """

    name: str
    passed: bool
    detail: str


def verify(
    path: str | Path,
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    progress: Progress = silent,
) -> Iterator[Check]:
    """Checks a delta or fusion file; yields each result as it is known.

    Args:
        path: the file. Of a fusion, the files that it names are checked too.
        base: Hugging Face folder; if given, every tensor's SHA-256 is compared with the header's.
        tuned: Hugging Face folder; if given (with `base`), every tensor of base + delta is compared with it. A fusion
            stands for none.
        progress: told how far the work is.

    Raises:
        DeltaweaveError: a file that cannot be opened at all; `tuned` for a fusion.
    """
    if is_fusion(path):
        if tuned is not None:
            raise DeltaweaveError(f"{path}: a fusion stands for no fine-tune that --tuned could be compared with")
        yield from _fusion(Path(path), base, progress)
        return
    with Delta.open(path) as delta:
        yield from _integrity(delta)
        if base is None:
            return
        checkpoint = Checkpoint.open(base)
        yield from _base(delta.header.base, checkpoint, progress)
        if tuned is not None:
            yield from _errors(delta, checkpoint, Checkpoint.open(tuned), progress)


def _integrity(delta: Delta) -> Iterator[Check]:
    problems = delta.verify()
    for problem in problems:
        yield Check("integrity", False, str(problem))
    if not problems:
        yield Check("integrity", True, f"every stored tensor has its checksum ({len(delta.names)} records)")


def _fusion(path: Path, base: str | Path | None, progress: Progress) -> Iterator[Check]:
    fusion = read_fusion(path)
    problems = verify_fusion(path)
    for problem in problems:
        yield Check("integrity", False, str(problem))
    if not problems:
        yield Check("integrity", True, f"every stored tensor has its checksum ({len(fusion.experts)} experts)")
    for expert in fusion.experts:
        if isinstance(expert, (LoraReference, DeltaReference)):
            yield _named_file(path, fusion, expert)
    if base is not None:
        yield from _base(fusion.base, Checkpoint.open(base), progress)


def _named_file(path: Path, fusion: Fusion, expert: LoraReference | DeltaReference) -> Check:
    """Whether an expert's own file is there, is the one that was meant, and has its checksums."""
    try:
        resolve_expert(path.parent, expert, fusion)
        file = path.parent / expert.path
        if isinstance(expert, DeltaReference):
            with Delta.open(file) as delta:
                problems = delta.verify()
        else:
            problems = verify_fusion(file)
    except FormatError as error:
        return Check("expert", False, f"{expert.name}: {error}")
    if problems:
        return Check("expert", False, f"{expert.name}: {file}: {problems[0]}")
    return Check("expert", True, f"{expert.name} is {file.name}, with its checksums")


def _base(expected: BaseIdentity, base: Checkpoint, progress: Progress) -> Iterator[Check]:
    found = base.identity(lambda done, total: progress("hashing the base", done, total))
    if found.root == expected.root:
        yield Check("base", True, f"{base.folder} is {expected.name}, root {expected.root[:12]}")
        return
    names = sorted({*found.tensors, *expected.tensors})
    wrong = [name for name in names if found.tensors.get(name) != expected.tensors.get(name)]
    yield Check(
        "base",
        False,
        f"{base.folder}: {len(wrong)} of {len(names)} tensors are not {expected.name}'s, first {wrong[0]}",
    )


def _errors(delta: Delta, base: Checkpoint, tuned: Checkpoint, progress: Progress) -> Iterator[Check]:
    """Compares what each record says of its error with what it is."""
    names = tuned_names(base, delta)
    missing = sorted({*tuned.names} - {*names} - {*tuned.tied})
    if missing:
        yield Check(
            "fine-tune",
            False,
            f"{tuned.folder}: base + delta lacks {missing[0]} ({len(missing)} tensors)",
        )
    worst, failed = 0.0, bool(missing)
    for done, name in enumerate(names):
        progress("comparing tensors", done, len(names))
        if name not in tuned:
            failed = True
            yield Check("fine-tune", False, f"{tuned.folder}: has no tensor {name}")
            continue
        error, allowed = _relative_error(delta, base, tuned, name)
        worst = max(worst, error)
        if error > allowed:
            failed = True
            yield Check(
                "fine-tune",
                False,
                f"{name}: relative error {error:.3g} of its delta, the file states {allowed:.3g}",
            )
    if not failed:
        yield Check(
            "fine-tune",
            True,
            f"{len(names)} tensors compared, largest relative error of a delta {worst:.3g}",
        )


def _relative_error(delta: Delta, base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[float, float]:
    """The Frobenius error over the delta's norm, and what the file allows, rounding to the stored dtype included."""
    target = tuned.tensor(name).float()
    value = tuned_tensor(base, delta, name).float()
    if value.shape != target.shape:
        return float("inf"), 0.0
    origin = base.resolve(name)
    before = base.tensor(origin).float() if origin else torch.zeros(0)
    change = target - before if before.shape == target.shape else target
    scale = float(change.norm())
    error = float((value - target).norm())
    if scale == 0:
        return (0.0 if error == 0 else float("inf")), 0.0
    stated = float(delta.record(name).quality.get("weight_error", 0.0)) if name in delta.names else 0.0
    rounding = torch.finfo(tuned.dtype(name)).eps / 2 * float(value.norm()) / scale
    return error / scale, stated * (1 + ERROR_TOLERANCE) + rounding
