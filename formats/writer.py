# SPDX-License-Identifier: Apache-2.0
"""Writing delta files, and the plainer files that keep a compression's finished parts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from deltaweave.formats.container import (
    Container,
    StoredTensor,
    parse_json,
    write_atomically,
    write_container,
    write_pieces,
)
from deltaweave.formats.delta import INDEX_SUFFIX
from deltaweave.formats.encoding import decode_record, encode_record
from deltaweave.formats.errors import DeltaweaveError, FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.header import FORMAT_NAME, FORMAT_VERSION, CarriedFile, Header
from deltaweave.formats.identity import tensor_digest
from deltaweave.formats.layout import FILES_PREFIX, MAX_HEADER, is_file_name, is_parameter_name
from deltaweave.formats.records import Record

__all__ = ["load_records", "save_records", "write_delta"]

PARTS_NAME = "deltaweave.records"
Tensors = dict[str, StoredTensor]


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
            than one shard the result is `NAME-DIGEST-00001-of-0000N.safetensors` and `NAME.safetensors.index.json`.
        force: replace an existing file.

    Returns:
        What to open: `path`, or the index of a sharded file.

    Raises:
        DeltaweaveError: the output exists or cannot be written.
        FormatError: a record or file name that the format does not allow.
    """
    path, files = Path(path), files or {}
    index_path = path.with_name(path.name + INDEX_SUFFIX)
    for existing in (path, index_path):
        if existing.is_dir():
            raise DeltaweaveError(f"{existing}: is a folder, expected a file name such as delta.safetensors")
        if existing.exists() and not force:
            raise DeltaweaveError(f"{existing}: exists (--force replaces it)")
    for name in files:
        if not is_file_name(name):
            raise FormatError(f"carried file {name!r}: expected a plain name of letters, digits, '.', '_' and '-'")
    carried = {name: CarriedFile(len(content), tensor_digest(content)) for name, content in files.items()}
    entries: dict[str, Any] = {}
    shards = list(_shards(records, files, entries, max_shard_bytes))
    text = _header_text(replace(header, files=carried), entries)
    replaced = _shards_of(path, index_path)
    if len(shards) <= 1:
        written = [path]
        write_container(path, shards[0] if shards else {}, _metadata(deltaweave=text))
    else:
        written = _write_shards(path, index_path, shards, text)
    for stale in {path, index_path, *replaced} - set(written):
        stale.unlink(missing_ok=True)
    return written[-1]


def save_records(path: str | Path, records: Mapping[str, Record], metadata: Mapping[str, Any]) -> None:
    """Keeps records in a file of its own, atomically and durably; `load_records` gives them back."""
    entries: dict[str, Any] = {}
    tensors: Tensors = {}
    for name, record in records.items():
        entries[name], stored = _named(name, record)
        tensors |= stored
    text = json.dumps({"records": entries, "metadata": dict(metadata)}, allow_nan=False)
    write_container(Path(path), tensors, {"format": PARTS_NAME, "deltaweave": text})


def load_records(path: str | Path) -> tuple[dict[str, Record], dict[str, Any]]:
    """Records kept by `save_records`, as views of the mapped file, and their metadata.

    Raises:
        FormatError: a damaged file.
    """
    container = Container.open(path)
    if container.metadata.get("format") != PARTS_NAME:
        raise FormatError(f"{path}: not a file of records")
    text = Fields(container.metadata, str(path), tolerant=True).string("deltaweave")
    fields = Fields(parse_json(text.encode("utf-8", errors="surrogatepass"), str(path)), str(path))
    entries = fields.parameters("records").value
    records = {
        name: decode_record(entry, name, container, str(path), tolerant=False) for name, entry in entries.items()
    }
    return records, fields.object("metadata")


def _named(name: str, record: Record) -> tuple[dict[str, Any], Tensors]:
    if not is_parameter_name(name):
        raise FormatError(f"record {name}: not an allowed parameter name")
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
    claimed: set[str] = set()
    size = 0
    for owner, tensors in _all_tensors(records, files, entries):
        own = sum(tensor.nbytes for tensor in tensors.values())
        if most is not None and shard and size + own > most:
            yield shard
            shard, size = {}, 0
        if claimed & tensors.keys():
            raise FormatError(f"record {owner}: two records claim one tensor name")
        claimed |= tensors.keys()
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
        yield name, {FILES_PREFIX + name: StoredTensor.of("U8", [np.frombuffer(content, dtype=np.uint8)])}


def _header_text(header: Header, entries: Mapping[str, Any]) -> str:
    version = ".".join(map(str, FORMAT_VERSION))
    content = {"format": FORMAT_NAME, "version": version, **header.to_json(), "records": entries}
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()  # refuses lone surrogates
        return text
    except (TypeError, ValueError) as error:
        raise FormatError(f"header: not expressible as JSON ({error})") from error


def _metadata(**fields: str) -> dict[str, str]:
    return {"format": FORMAT_NAME, "version": ".".join(map(str, FORMAT_VERSION)), **fields}


def _write_shards(path: Path, index_path: Path, shards: list[Tensors], text: str) -> list[Path]:
    """Shards first, the index last: until it is there, an older index and its shards are whole.

    Shards carry the header's digest in their names, so that those of another delta are never overwritten.
    """
    digest = tensor_digest(text.encode())
    weight_map: dict[str, str] = {}
    shard_paths, created = [], []
    try:
        for number, tensors in enumerate(shards, 1):
            shard_path = path.with_name(f"{path.stem}-{digest[:8]}-{number:05d}-of-{len(shards):05d}{path.suffix}")
            shard_paths.append(shard_path)
            if not shard_path.exists():
                created.append(shard_path)
            write_container(shard_path, tensors, _metadata(header_sha256=digest))
            weight_map |= dict.fromkeys(tensors, shard_path.name)
        total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        index = {"metadata": _metadata(deltaweave=text) | {"total_size": total}, "weight_map": weight_map}
        encoded = json.dumps(index, ensure_ascii=False, indent=1).encode()
        if len(encoded) > 2 * MAX_HEADER:
            raise FormatError(f"{index_path}: index of {len(encoded)} bytes, expected at most {2 * MAX_HEADER}")
        write_atomically(index_path, lambda write: write_pieces(write, [encoded], []))
    except BaseException:
        for file in created:
            file.unlink(missing_ok=True)
        raise
    return [*shard_paths, index_path]


def _shards_of(path: Path, index_path: Path) -> list[Path]:
    """The shards of a delta that is about to be replaced: files that its index lists and that are named as ours."""
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{8}-\d{5}-of-\d{5}" + re.escape(path.suffix))
    try:
        names = set(json.loads(index_path.read_bytes())["weight_map"].values())
        return [path.with_name(name) for name in names if pattern.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
