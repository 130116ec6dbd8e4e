# SPDX-License-Identifier: Apache-2.0
"""Base + delta back to a dense Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from deltaweave.converter.checkpoint import DTYPES, INDEX_FILE, SINGLE_FILE, Checkpoint
from deltaweave.converter.errors import CheckpointError, OutputError
from deltaweave.converter.plan import Progress, silent
from deltaweave.formats import BaseIdentity, Delta, ReplaceRecord
from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["apply", "require_base", "require_identity", "tuned_names", "tuned_tensor", "write_side_files"]

SHARD_BYTES = 2 * 10**9
# Files of a checkpoint folder that are not weights: the base's are copied, the delta's own then replace them.
SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")


def apply(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    accept_base: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Writes the fine-tune that a delta stands for as a folder that `transformers` loads.

    Args:
        base: Hugging Face folder of the base that the delta was made from.
        delta: the delta file.
        output: the folder to write.
        accept_base: take a base whose fingerprint differs (a cast or requantized copy) as long as all shapes fit.
        force: replace an existing folder.
        progress: told how far the work is.

    Raises:
        CheckpointError: another base than the delta's.
        OutputError: the output exists.
        FormatError: a damaged delta.
    """
    output = Path(output)
    if output.exists() and not force:
        raise OutputError(f"{output}: exists (--force replaces it)")
    checkpoint = Checkpoint.open(base)
    temporary = output.with_name(output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with Delta.open(delta) as opened:
        require_base(checkpoint, opened, accept=accept_base)
        temporary.mkdir(parents=True)
        try:
            _write_weights(checkpoint, opened, temporary, progress)
            write_side_files(checkpoint, opened, temporary)
            _replace_folder(temporary, output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return output


def require_base(base: Checkpoint, delta: Delta, *, accept: bool = False) -> None:
    """Refuses a base that is not the delta's; see `require_identity`."""
    require_identity(base, delta.header.base, delta.path, accept=accept)


def require_identity(base: Checkpoint, expected: BaseIdentity, path: str | Path, *, accept: bool = False) -> None:
    """Refuses a base other than the one that a file was made from, by sampled bytes (`verify` compares all).

    Raises:
        CheckpointError: naming both.
    """
    if not accept and base.fingerprint() != expected.fingerprint:
        raise CheckpointError(
            f"{base.folder}: is not the base that {path} was made from ({expected.name}, root "
            f"{expected.root[:12]}); --accept-base takes it all the same"
        )


def tuned_names(base: Checkpoint, delta: Delta) -> list[str]:
    """The tensors of base + delta: the base's, those that the delta adds, without aliases of tied weights.

    A weight that is tied in the base alone is one: it has no record where the fine-tune left it at the base's value.
    """
    tied = delta.header.architecture.tied
    return sorted(name for name in {*base.names, *base.tied, *delta.names} if name not in tied)


def tuned_tensor(base: Checkpoint, delta: Delta, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of base + delta, in the fine-tune's dtype unless another is given.

    Rounding the sum to 16 bits costs a small delta some of itself; kernels that add the delta's own product lose none.

    Raises:
        CheckpointError: the base's shape does not fit the record's.
    """
    dtype = dtype or DTYPES[delta.header.tuned.dtype]
    origin = base.resolve(name)
    if name not in delta.names:
        return base.tensor(origin or name).to(dtype)
    record = delta.record(name)
    if isinstance(record, ReplaceRecord):
        return torch.from_numpy(record.values.to_float32()).to(DTYPES[record.values.dtype])
    before = base.tensor(origin).float().numpy() if origin else None
    if before is not None and before.shape[1:] != tuple(record.shape[1:]):
        raise CheckpointError(
            f"{base.folder}: {name} has shape {list(before.shape)}, {delta.path} expects {list(record.shape)}"
        )
    return torch.from_numpy(delta.apply_to(name, before)).to(dtype)


def _write_weights(base: Checkpoint, delta: Delta, folder: Path, progress: Progress) -> None:
    shards: list[list[str]] = []
    for names, tensors in _shards(base, delta, progress):
        shards.append(names)
        _save_shard(tensors, folder / _shard_name(len(shards)))
    if len(shards) == 1:
        (folder / _shard_name(1)).rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        total += (folder / _shard_name(number)).stat().st_size
        (folder / _shard_name(number)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _save_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:  # a full disk is the former
        raise OutputError(f"{file}: cannot be written ({error})") from error


def _shards(base: Checkpoint, delta: Delta, progress: Progress) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    names = tuned_names(base, delta)
    for done, name in enumerate(names):
        progress("applying", done, len(names))
        tensor = tuned_tensor(base, delta, name).contiguous()
        if tensors and size + tensor.nbytes > SHARD_BYTES:
            yield list(tensors), tensors
            tensors, size = {}, 0
        tensors[name] = tensor
        size += tensor.nbytes
    yield list(tensors), tensors


def _shard_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def write_side_files(base: Checkpoint, delta: Delta, folder: Path) -> None:
    """Everything of base + delta but its weights: configuration, tokenizer, licence; the delta's own files win."""
    for pattern in SIDE_FILES:
        for file in base.folder.glob(pattern):
            if file.is_file() and file.name != INDEX_FILE:
                shutil.copyfile(file, folder / file.name)
    for name in delta.header.files:
        (folder / name).write_bytes(delta.file(name))


def _replace_folder(temporary: Path, output: Path) -> None:
    old = output.with_name(output.name + ".old")
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()
