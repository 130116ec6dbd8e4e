# SPDX-License-Identifier: Apache-2.0
"""Writing delta files, and the plainer files that keep a compression's finished parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from deltaweave.formats.container import Container, parse_json, write_atomically, write_container, write_pieces
from deltaweave.formats.delta import FILES_PREFIX
from deltaweave.formats.encoding import decode_record, encode_record
from deltaweave.formats.errors import DeltaweaveError, FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.header import FORMAT_NAME, FORMAT_VERSION, CarriedFile, Header, is_file_name
from deltaweave.formats.identity import tensor_digest
from deltaweave.formats.matrix import ALIGNMENT
from deltaweave.formats.records import Record
from numpy.typing import NDArray

__all__ = ["load_records", "save_records", "write_delta"]

PARTS_NAME = "deltaweave.records"
Tensors = dict[str, NDArray[Any]]


def write_delta(
    path: str | Path,
    header: Header,
    records: Mapping[str, Record],
    *,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
) -> Path:
    """Writes a delta file: whole, or not at all.

    Args:
        path: the file, `NAME.safetensors`.
        header: everything but the records; its `files` are replaced by `files`.
        records: by parameter name; arrays mapped from other files are streamed.
        files: carried files by name.
        max_shard_bytes: start another shard when one would grow beyond this; a record is never split. With more
            than one shard the result is `NAME-00001-of-0000N.safetensors` and `NAME.safetensors.index.json`.
        force: replace an existing file.

    Returns:
        What to open: `path`, or the index of a sharded file.

    Raises:
        DeltaweaveError: the output exists or cannot be written.
        FormatError: a record or file name that the format does not allow.
    """
    path, files = Path(path), files or {}
    index_path = path.with_name(path.name + ".index.json")
    for existing in (path, index_path):
        if existing.exists() and not force:
            raise DeltaweaveError(f"{existing}: exists (--force replaces it)")
    for name in files:
        if not is_file_name(name):
            raise FormatError(f"carried file {name!r}: expected a plain name of letters, digits, '.', '_' and '-'")
    carried = {name: CarriedFile(len(content), tensor_digest(content)) for name, content in files.items()}
    entries: dict[str, Any] = {}
    shards = list(_shards(records, files, entries, max_shard_bytes))
    text = _header_text(replace(header, files=carried), entries)
    if len(shards) <= 1:
        write_container(path, shards[0] if shards else {}, _metadata(deltaweave=text))
        return path
    return _write_shards(path, index_path, shards, text)


def save_records(path: str | Path, records: Mapping[str, Record], metadata: Mapping[str, Any]) -> None:
    """Keeps records in a file of its own, atomically and durably; `load_records` gives them back."""
    entries: dict[str, Any] = {}
    tensors: Tensors = {}
    for name, record in records.items():
        entries[name], stored = _named(name, record)
        tensors |= stored
    text = json.dumps({"records": entries, "metadata": dict(metadata)})
    write_container(Path(path), tensors, {"format": PARTS_NAME, "deltaweave": text})


def load_records(path: str | Path) -> tuple[dict[str, Record], dict[str, Any]]:
    """Records kept by `save_records`, as views of the mapped file, and their metadata.

    Raises:
        FormatError: a damaged file.
    """
    container = Container.open(path)
    if container.metadata.get("format") != PARTS_NAME:
        raise FormatError(f"{path}: not a file of records")
    fields = Fields(parse_json(container.metadata["deltaweave"].encode(), str(path)), str(path))
    entries = fields.object("records")
    records = {
        name: decode_record(entry, name, container, str(path), tolerant=False) for name, entry in entries.items()
    }
    return records, fields.object("metadata")


def _named(name: str, record: Record) -> tuple[dict[str, Any], Tensors]:
    try:
        entry, tensors = encode_record(record)
    except FormatError as error:
        raise FormatError(f"record {name}: {error}") from error
    return entry, {f"{name}.{part}": array for part, array in tensors.items()}


def _shards(
    records: Mapping[str, Record],
    files: Mapping[str, bytes],
    entries: dict[str, Any],
    most: int | None,
) -> Iterator[Tensors]:
    """Tensors shard by shard; fills in `entries` on the way."""
    shard: Tensors = {}
    size = 0
    for owner, tensors in _all_tensors(records, files, entries):
        own = sum(array.nbytes for array in tensors.values())
        if most is not None and shard and size + own > most:
            yield shard
            shard, size = {}, 0
        if set(shard) & set(tensors):
            raise FormatError(f"record {owner}: two records claim one tensor name")
        shard |= tensors
        size += own
    if shard:
        yield shard


def _all_tensors(
    records: Mapping[str, Record], files: Mapping[str, bytes], entries: dict[str, Any]
) -> Iterator[tuple[str, Tensors]]:
    for name, record in records.items():
        entries[name], tensors = _named(name, record)
        yield name, tensors
    for name, content in files.items():
        padding = bytes(-len(content) % ALIGNMENT)
        yield name, {FILES_PREFIX + name: np.frombuffer(content + padding, dtype=np.uint8)}


def _header_text(header: Header, entries: Mapping[str, Any]) -> str:
    version = ".".join(map(str, FORMAT_VERSION))
    content = {"format": FORMAT_NAME, "version": version, **header.to_json(), "records": entries}
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise FormatError(f"header: not expressible as JSON ({error})") from error


def _metadata(**fields: str) -> dict[str, str]:
    return {"format": FORMAT_NAME, "version": ".".join(map(str, FORMAT_VERSION)), **fields}


def _write_shards(path: Path, index_path: Path, shards: list[Tensors], text: str) -> Path:
    """Shards first, the index last: until it appears there is no file to open."""
    digest = tensor_digest(text.encode())
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    try:
        for number, tensors in enumerate(shards, 1):
            name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
            write_container(path.with_name(name), tensors, _metadata(header_sha256=digest))
            written.append(path.with_name(name))
            weight_map |= dict.fromkeys(tensors, name)
        total = sum(array.nbytes for tensors in shards for array in tensors.values())
        index = {"metadata": {"total_size": total, "deltaweave": text}, "weight_map": weight_map}
        encoded = json.dumps(index, ensure_ascii=False, indent=1).encode()
        write_atomically(index_path, lambda write: write_pieces(write, [encoded], []))
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    return index_path
