# SPDX-License-Identifier: Apache-2.0
"""The header of a delta: what it is of, how it was made, and where its records are (SPEC.md, "Header")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaweave.formats.container import ITEM_BITS, parse_json
from deltaweave.formats.errors import FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.identity import BaseIdentity, TensorIdentity, tensor_digest
from deltaweave.formats.layout import is_file_name, is_parameter_name
from deltaweave.formats.records import NUMPY_DTYPES

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "Architecture",
    "CarriedFile",
    "Header",
    "TunedInfo",
    "decode_architecture",
    "decode_base",
    "header_digest",
    "header_fields",
    "parse_version",
]

FORMAT_NAME = "deltaweave.delta"
FORMAT_VERSION = (1, 0)


@dataclass(frozen=True)
class TunedInfo:
    """The fine-tune.

    Attributes:
        name: what it calls itself.
        revision: of its repository, if known.
        license: as its model card states it, if it does.
        dtype: of its parameters: `F32`, `F16` or `BF16`.
        bytes: of all its tensors.
    """

    name: str
    revision: str | None
    license: str | None
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Architecture:
    """What a reader must know of the model.

    Attributes:
        model_type: as in its `config.json`.
        tied: parameters that share another one's storage (alias to owner); they have no record of their own.
    """

    model_type: str
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CarriedFile:
    """A file of the tuned folder that travels with the delta.

    Attributes:
        bytes: its length.
        sha256: of its content, in hexadecimal.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """Everything but the records.

    Attributes:
        tool: name and version of what wrote the file.
        base: the checkpoint it belongs to.
        tuned: the checkpoint it was made from.
        architecture: of the model.
        method: JSON object; `name` is required (`delta-come`, `round-to-nearest`, `low-rank`, `bitdelta`), the rest
            is the recipe.
        calibration: JSON object describing the data, or None.
        files: carried files by name; `write_delta` fills it in.
    """

    tool: str
    base: BaseIdentity
    tuned: TunedInfo
    architecture: Architecture
    method: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None
    files: Mapping[str, CarriedFile] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The header's JSON object, records left out."""
        return {
            "tool": self.tool,
            "base": asdict(self.base),
            "tuned": asdict(self.tuned),
            "architecture": asdict(self.architecture),
            "method": dict(self.method),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "files": {name: asdict(file) for name, file in self.files.items()},
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Header:
        """Reads and checks a header; keys of records and bytes are the caller's.

        Raises:
            FormatError: naming the key that is wrong.
        """
        method = fields.object("method")
        if not isinstance(method.get("name"), str):
            fields.fail("method", "has no name")
        return cls(
            tool=fields.string("tool"),
            base=decode_base(fields.nested("base")),
            tuned=_tuned(fields.nested("tuned")),
            architecture=decode_architecture(fields.nested("architecture")),
            method=method,
            calibration=None if fields.get("calibration") is None else fields.object("calibration"),
            files=_files(fields.nested("files")),
        )


def parse_version(text: str, where: str) -> tuple[int, int]:
    """Major and minor.

    Raises:
        FormatError: not a version, or another major than this reader knows.
    """
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
    if not match:
        raise FormatError(f"{where}: version {text[:40]!r}, expected MAJOR.MINOR")
    major, minor = int(match[1]), int(match[2])
    if major != FORMAT_VERSION[0]:
        raise FormatError(f"{where}: format version {major}.{minor}, this reader knows {FORMAT_VERSION[0]}.x")
    return major, minor


def header_fields(metadata: Mapping[str, Any], where: str, name: str) -> Fields:
    """The header's JSON object, if the metadata are those of a file of this format and of a version that can be read.

    Args:
        metadata: `__metadata__` of the file, or of its index.
        where: the file, for messages.
        name: of the format.

    Raises:
        FormatError: another format, a newer major version, or no JSON object.
    """
    found = metadata.get("format")
    if found != name:
        raise FormatError(f"{where}: format {str(found)[:60]!r}, expected {name!r}")
    outer = Fields(metadata, f"{where}: metadata", tolerant=True)
    version_text = outer.string("version")
    version = parse_version(version_text, where)
    text = _header_bytes(outer.string("deltaweave"))
    fields = Fields(parse_json(text, f"{where}: header"), f"{where}: header", tolerant=version > FORMAT_VERSION)
    fields.choice("format", (name,))
    fields.choice("version", (version_text,))
    return fields


def header_digest(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of the header string, which holds the digests of all tensors: it names a file's content."""
    return tensor_digest(_header_bytes(str(metadata.get("deltaweave"))))


def _header_bytes(text: str) -> bytes:
    """The header is a string inside JSON and may hold lone surrogates there, which no UTF-8 file could."""
    return text.encode("utf-8", errors="surrogatepass")


def decode_base(fields: Fields) -> BaseIdentity:
    """The identity of a base, as every header has it."""
    tensors = fields.parameters("tensors")
    identity = BaseIdentity(
        name=fields.string("name"),
        revision=fields.optional_string("revision"),
        license=fields.optional_string("license"),
        root=fields.digest("root"),
        fingerprint=fields.digest("fingerprint"),
        tensors={name: _tensor(tensors.nested(name)) for name in tensors.value},
    )
    fields.done()
    return identity


def _tensor(fields: Fields) -> TensorIdentity:
    identity = TensorIdentity(
        fields.digest("sha256"), fields.choice("dtype", ITEM_BITS), fields.shape("shape", least=0)
    )
    fields.done()
    return identity


def _tuned(fields: Fields) -> TunedInfo:
    info = TunedInfo(
        name=fields.string("name"),
        revision=fields.optional_string("revision"),
        license=fields.optional_string("license"),
        dtype=fields.choice("dtype", NUMPY_DTYPES),
        bytes=fields.natural("bytes", most=1 << 53),
    )
    fields.done()
    return info


def decode_architecture(fields: Fields) -> Architecture:
    """The architecture, as every header has it."""
    tied = fields.parameters("tied").value
    if not all(isinstance(owner, str) and is_parameter_name(owner) and owner not in tied for owner in tied.values()):
        fields.fail("tied", "must map names to names of parameters that are not tied themselves")
    architecture = Architecture(fields.string("model_type"), tied)
    fields.done()
    return architecture


def _files(fields: Fields) -> dict[str, CarriedFile]:
    files = {}
    for name in fields.value:
        if not is_file_name(name):
            fields.fail(name[:200], "not an allowed file name")
        entry = fields.nested(name)
        files[name] = CarriedFile(entry.natural("bytes"), entry.digest("sha256"))
        entry.done()
    return files
