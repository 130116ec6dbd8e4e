# SPDX-License-Identifier: Apache-2.0
"""Reading delta files: opening maps and checks the header; records are views of the file until they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from deltaweave.formats.accounting import FileBytes, count_bytes
from deltaweave.formats.container import Container, parse_json
from deltaweave.formats.encoding import RECORD_KINDS, decode_record, parts_of
from deltaweave.formats.errors import FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.header import FORMAT_NAME, Header, header_digest, header_fields
from deltaweave.formats.identity import root_digest, tensor_digest
from deltaweave.formats.layout import ALIGNMENT, FILES_PREFIX, MAX_HEADER, padded
from deltaweave.formats.records import DenseRecord, FactoredRecord, Record, apply_record
from numpy.typing import NDArray

__all__ = ["INDEX_SUFFIX", "Delta", "Problem"]

INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Problem:
    """Something that `Delta.verify` found.

    Attributes:
        tensor: the stored tensor, or the header's key.
        message: what is wrong with it.
    """

    tensor: str
    message: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.message}"


class Delta:
    """A delta file, opened.

    Attributes:
        path: as it was opened.
        header: what it is of and how it was made.
        header_sha256: of the header string: another file's is another.
        names: parameters that have a record, in file order.
    """

    def __init__(self, containers: list[Container], metadata: Mapping[str, Any], path: Path | str) -> None:
        """Checks the header and that stored tensors and records fit together; use `open` or `from_bytes`."""
        self.path = Path(path)
        self._shards = containers
        self._containers = {name: container for container in containers for name in container.tensors}
        fields = header_fields(metadata, str(path), FORMAT_NAME)
        self.header_sha256 = header_digest(metadata)
        self.header = Header.from_json(fields)
        self._tolerant = fields.tolerant
        self._entries = fields.parameters("records").value
        fields.done()
        self.names = list(self._entries)
        self._require_all_tensors(str(path))

    @classmethod
    def open(cls, path: str | Path) -> Delta:
        """Opens a file, or the `.index.json` of a sharded one; costs a header's reading, whatever the size.

        Raises:
            FormatError: not a delta, damaged, or of a newer major version.
        """
        path = Path(path)
        if path.name.endswith(INDEX_SUFFIX):
            return _open_sharded(cls, path)
        return cls._of(Container.open(path), path)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, path: str = "bytes") -> Delta:
        """Opens a file held in memory.

        Raises:
            FormatError: as `open`.
        """
        return cls._of(Container(memoryview(data), path), path)

    @classmethod
    def _of(cls, container: Container, path: Path | str) -> Delta:
        if "header_sha256" in container.metadata:
            raise FormatError(f"{path}: is one shard of a delta; open its {INDEX_SUFFIX}")
        return cls([container], container.metadata, path)

    def __enter__(self) -> Delta:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file; views of it that are still in use keep it mapped."""
        self._containers, self._shards = {}, []

    def record(self, name: str) -> Record:
        """One record, as views of the file.

        Raises:
            FormatError: no such record, or one that is damaged (scales that are not finite included).
        """
        if name not in self._entries:
            raise FormatError(f"{self.path}: has no record {name[:200]}")
        return decode_record(
            self._entries[name],
            name,
            self._container(name),
            str(self.path),
            tolerant=self._tolerant,
        )

    def records(self) -> Iterator[tuple[str, Record]]:
        """All records in file order."""
        return ((name, self.record(name)) for name in self.names)

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """The delta of a parameter, [out_features, in_features] float32.

        A lying file can make this as large as the product of two numbers of its own size; compare the record's
        shape with the base's first.

        Raises:
            FormatError: a record that is no delta but a replacement.
        """
        record = self.record(name)
        if not isinstance(record, (FactoredRecord, DenseRecord)):
            raise FormatError(f"{self.path}: {name} is not stored as a delta; apply_to gives its value")
        return record.dequantize()

    def apply_to(self, name: str, base: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """The tuned value of a parameter from the base's (float32); see `apply_record`."""
        return apply_record(self.record(name), base)

    def file(self, name: str) -> bytes:
        """The content of a carried file.

        Raises:
            FormatError: no such file, or one that does not match its digest.
        """
        if name not in self.header.files:
            raise FormatError(f"{self.path}: carries no file {name[:200]}")
        content = self._stored_file(name)[: self.header.files[name].bytes]
        if tensor_digest(content) != self.header.files[name].sha256:
            raise FormatError(f"{self.path}: carried file {name} does not match its digest")
        return bytes(content)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(container.size for container in self._shards)

    def byte_count(self) -> FileBytes:
        """Where the file's bytes go."""
        return count_bytes(self)

    def verify(self) -> list[Problem]:
        """Compares every stored tensor and carried file with its checksum, and decodes every record."""
        problems = []
        if root_digest(self.header.base.tensors) != self.header.base.root:
            problems.append(Problem("base.root", "is not the digest of the base tensors listed"))
        for name in self.names:
            problems += self._verify_record(name)
        for name in self.header.files:
            problems += self._verify_file(name)
        return problems

    def _verify_record(self, name: str) -> Iterator[Problem]:
        try:
            self.record(name)
        except FormatError as error:
            yield Problem(name, str(error))
            return
        for part in parts_of(self._entries[name]["kind"]):
            if tensor_digest(self._container(name).raw(f"{name}.{part}")) != self._entries[name]["sha256"][part]:
                yield Problem(f"{name}.{part}", "checksum does not match")

    def _verify_file(self, name: str) -> Iterator[Problem]:
        tensor, file, raw = FILES_PREFIX + name, self.header.files[name], self._stored_file(name)
        if tensor_digest(raw[: file.bytes]) != file.sha256:
            yield Problem(tensor, "checksum does not match")
        if any(raw[file.bytes :]):
            yield Problem(tensor, "padding is not zero")

    def _stored_file(self, name: str) -> memoryview:
        self._require_open()
        return self._containers[FILES_PREFIX + name].raw(FILES_PREFIX + name)

    def _container(self, name: str) -> Container:
        """The shard of a record; all parts of one record lie in one shard."""
        self._require_open()
        parts = parts_of(self._entries[name]["kind"])
        return self._containers[f"{name}.{parts[0]}"] if parts else self._shards[0]

    def _require_open(self) -> None:
        if not self._shards:
            raise FormatError(f"{self.path}: is closed")

    def _require_all_tensors(self, where: str) -> None:
        """Every tensor belongs to exactly one record or carried file, and all of those are there."""
        claimed: set[str] = set()
        for tensor in self._claimed_tensors(where):
            if tensor in claimed or tensor not in self._containers:
                problem = "belongs to two records" if tensor in claimed else "is missing"
                raise FormatError(f"{where}: tensor {tensor[:200]} {problem}")
            claimed.add(tensor)
        if unclaimed := sorted(self._containers.keys() - claimed):
            raise FormatError(f"{where}: tensor {unclaimed[0][:200]} belongs to no record")
        for name, file in self.header.files.items():
            container = self._containers[FILES_PREFIX + name]
            entry = container.tensors[FILES_PREFIX + name]
            if entry.dtype != "U8" or entry.stop - entry.start != padded(file.bytes) or entry.start % ALIGNMENT:
                raise FormatError(f"{where}: carried file {name} of {file.bytes} bytes is not stored as such")

    def _claimed_tensors(self, where: str) -> Iterator[str]:
        for name in self.header.files:
            yield FILES_PREFIX + name
        for name, entry in self._entries.items():
            if name in self.header.architecture.tied:
                raise FormatError(f"{where}: record {name} is of a tied parameter, which has none of its own")
            kind = Fields(entry, f"{where}: record {name}", tolerant=True).choice("kind", RECORD_KINDS)
            for part in parts_of(kind):
                yield f"{name}.{part}"


def _open_sharded(cls: type[Delta], index_path: Path) -> Delta:
    """Opens all shards that an index names; each must name the header that the index holds."""
    index = Fields(_read_index(index_path), str(index_path), tolerant=True)
    metadata = index.object("metadata")
    weight_map = index.object("weight_map")
    digest = header_digest(metadata)
    found: dict[str, str] = {}
    containers = []
    for file in sorted({str(file) for file in weight_map.values()}):
        if Path(file).name != file or not (index_path.parent / file).is_file():
            raise FormatError(f"{index_path.parent}: shard {file[:200]} is missing ({index_path.name} lists it)")
        container = Container.open(index_path.parent / file)
        if container.metadata.get("header_sha256") != digest:
            raise FormatError(f"{container.path}: belongs to another index than {index_path.name}")
        if twice := found.keys() & container.tensors.keys():
            raise FormatError(f"{container.path}: tensor {min(twice)[:200]} lies in two shards")
        found |= dict.fromkeys(container.tensors, file)
        containers.append(container)
    if not containers or found != weight_map:
        odd = min((name for name in found | weight_map if found.get(name) != weight_map.get(name)), default="")
        raise FormatError(f"{index_path}: weight_map does not say where tensor {odd[:200]} lies")
    return cls(containers, metadata, index_path)


def _read_index(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(2 * MAX_HEADER + 1)
    except OSError as error:
        raise FormatError(f"{path}: not readable ({error.strerror})") from error
    if len(text) > 2 * MAX_HEADER:
        raise FormatError(f"{path}: index of more than {2 * MAX_HEADER} bytes")
    return parse_json(text, str(path))
