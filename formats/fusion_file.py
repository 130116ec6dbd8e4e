# SPDX-License-Identifier: Apache-2.0
"""Reading and writing fusion files: the container and the strictness of deltas, LoRAs and gates inside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deltaweave.formats.container import Container, StoredTensor, write_container
from deltaweave.formats.delta import Delta, Problem
from deltaweave.formats.encoding import exactly, stored_array
from deltaweave.formats.errors import DeltaweaveError, FormatError
from deltaweave.formats.fields import Fields
from deltaweave.formats.fusion import (
    MAX_EXPERTS,
    BlockGate,
    DeltaExpert,
    DeltaReference,
    Expert,
    FixedGate,
    Fusion,
    Lora,
    LoraMatrix,
    LoraReference,
    TokenGate,
)
from deltaweave.formats.header import FORMAT_VERSION, decode_architecture, decode_base, header_digest, header_fields
from deltaweave.formats.identity import root_digest, tensor_digest
from deltaweave.formats.records import NUMPY_DTYPES, ExactArray

__all__ = [
    "FUSION_NAME",
    "fusion_digest",
    "is_fusion",
    "open_tenant",
    "parse_fusion",
    "read_fusion",
    "resolve_expert",
    "resolve_fusion",
    "verify_fusion",
    "write_fusion",
]

FUSION_NAME = "deltaweave.fusion"
Tensors = dict[str, StoredTensor]


def write_fusion(path: str | Path, fusion: Fusion, *, force: bool = False) -> Path:
    """Writes a fusion file: whole, or not at all.

    Args:
        path: the file, `NAME.safetensors`.
        fusion: arrays mapped from other files are streamed.
        force: replace an existing file.

    Raises:
        DeltaweaveError: the output exists or cannot be written.
        FormatError: a header that JSON cannot express.
    """
    path = Path(path)
    if path.exists() and (path.is_dir() or not force):
        problem = "is a folder, expected a file name" if path.is_dir() else "exists (--force replaces it)"
        raise DeltaweaveError(f"{path}: {problem}")
    tensors: Tensors = {}
    version = ".".join(map(str, FORMAT_VERSION))
    header = {
        "format": FUSION_NAME,
        "version": version,
        "tool": fusion.tool,
        "base": asdict(fusion.base),
        "architecture": asdict(fusion.architecture),
        "method": dict(fusion.method),
        "training": None if fusion.training is None else dict(fusion.training),
        "experts": [_expert_entry(index, expert, tensors) for index, expert in enumerate(fusion.experts)],
        "gate": _gate_entry(fusion.gate, tensors),
    }
    try:
        text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()  # refuses lone surrogates
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: header is not expressible as JSON ({error})") from error
    write_container(path, tensors, {"format": FUSION_NAME, "version": version, "deltaweave": text})
    return path


def is_fusion(path: str | Path) -> bool:
    """Whether a file says that it is a fusion; what cannot be read is none."""
    try:
        return Container.open(path).metadata.get("format") == FUSION_NAME
    except FormatError:
        return False


def read_fusion(path: str | Path) -> Fusion:
    """Opens a fusion file; matrices are views of the mapped file.

    Raises:
        FormatError: not a fusion, damaged, or of a newer major version.
    """
    return _decode(Container.open(path))


def parse_fusion(data: bytes | memoryview, path: str = "bytes") -> Fusion:
    """A fusion from a file held in memory; see `read_fusion`."""
    return _decode(Container(memoryview(data), path))


def resolve_fusion(path: str | Path) -> Fusion:
    """A fusion with what it names in other files: LoRAs inlined as views of those files, deltas opened.

    Raises:
        FormatError: as `read_fusion`; a file that is missing, is another than was meant, holds more than one LoRA, or
            is of another base.
    """
    fusion = read_fusion(path)
    folder = Path(path).parent
    experts = tuple(resolve_expert(folder, expert, fusion) for expert in fusion.experts)
    try:
        return replace(fusion, experts=experts)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


@contextmanager
def open_tenant(path: str | Path) -> Iterator[Delta | Fusion]:
    """A delta file, or a fusion file with what it names, open while the block lasts.

    Raises:
        FormatError: as `Delta.open` and `resolve_fusion`.
    """
    if not is_fusion(path):
        with Delta.open(path) as delta:
            yield delta
        return
    fusion = resolve_fusion(path)
    try:
        yield fusion
    finally:
        for expert in fusion.experts:
            if isinstance(expert, DeltaExpert):
                expert.delta.close()


def resolve_expert(folder: Path, expert: Expert, fusion: Fusion) -> Expert:
    """One expert of a fusion that lies in `folder`, with the file that it names; see `resolve_fusion`."""
    if isinstance(expert, LoraReference):
        return _resolved_lora(folder / expert.path, expert, fusion)
    if isinstance(expert, DeltaReference):
        return _resolved_delta(folder / expert.path, expert, fusion)
    return expert


def fusion_digest(path: str | Path) -> str:
    """What a `LoraReference` says of a file: the SHA-256 of its header string.

    Raises:
        FormatError: not a readable fusion.
    """
    container = Container.open(path)
    _header(container)
    return header_digest(container.metadata)


def verify_fusion(path: str | Path) -> list[Problem]:
    """Compares every stored tensor with its checksum, and the base's root with its tensors.

    Raises:
        FormatError: a file that cannot be opened as a fusion at all.
    """
    container = Container.open(path)
    fusion = _decode(container)
    problems = []
    if root_digest(fusion.base.tensors) != fusion.base.root:
        problems.append(Problem("base.root", "is not the digest of the base tensors listed"))
    for name, digest in _digests(_header(container)).items():
        if tensor_digest(container.raw(name)) != digest:
            problems.append(Problem(name, "checksum does not match"))
    return problems


# Encoding


def _expert_entry(index: int, expert: Expert, tensors: Tensors) -> dict[str, Any]:
    if isinstance(expert, DeltaExpert):
        raise FormatError(f"expert {expert.name}: an opened delta, expected a DeltaReference to its file")
    if isinstance(expert, (LoraReference, DeltaReference)):
        return {"kind": "reference" if isinstance(expert, LoraReference) else "delta", **asdict(expert)}
    modules = {}
    for name, matrix in expert.modules.items():
        digests = _add(tensors, f"experts/{index}/{name}", a=matrix.a, b=matrix.b)
        shape = list(matrix.shape)
        scale, dtype = float(matrix.scale), matrix.a.dtype
        modules[name] = {"shape": shape, "rank": matrix.rank, "scale": scale, "dtype": dtype, "sha256": digests}
    return {"kind": "lora", "name": expert.name, "license": expert.license, "modules": modules}


def _gate_entry(gate: FixedGate | TokenGate, tensors: Tensors) -> dict[str, Any]:
    if isinstance(gate, FixedGate):
        return {"kind": "fixed", "weights": [float(weight) for weight in gate.weights]}
    blocks = {
        name: {
            "dtype": block.weight.dtype,
            "sha256": _add(tensors, f"gate/{name}", weight=block.weight, bias=block.bias),
        }
        for name, block in gate.blocks.items()
    }
    hidden = int(next(iter(gate.blocks.values())).weight.data.shape[1])
    return {"kind": "token", "temperature": float(gate.temperature), "hidden_size": hidden, "blocks": blocks}


def _add(tensors: Tensors, owner: str, **arrays: ExactArray) -> dict[str, str]:
    """Stores the arrays as `<owner>.<part>`; their digests by part."""
    digests = {}
    for part, array in arrays.items():
        tensor = tensors[f"{owner}.{part}"] = StoredTensor.of(array.dtype, [array.data])
        digests[part] = tensor.digest()
    return digests


# Decoding


def _decode(container: Container) -> Fusion:
    fields = _header(container)
    where = str(container.path)
    method = fields.object("method")
    if not isinstance(method.get("name"), str):
        fields.fail("method", "has no name")
    experts = tuple(_expert(index, entry, container) for index, entry in enumerate(_expert_fields(fields)))
    arguments: dict[str, Any] = {
        "tool": fields.string("tool"),
        "base": decode_base(fields.nested("base")),
        "architecture": decode_architecture(fields.nested("architecture")),
        "method": method,
        "experts": experts,
        "gate": _gate(fields.nested("gate"), len(experts), container),
        "training": None if fields.get("training") is None else fields.object("training"),
    }
    fields.done()
    _require_all_tensors(container, set(_digests(_header(container))))
    try:
        return Fusion(**arguments)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error


def _header(container: Container) -> Fields:
    return header_fields(container.metadata, str(container.path), FUSION_NAME)


def _expert_fields(fields: Fields) -> list[Fields]:
    entries = fields.get("experts")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_EXPERTS:
        fields.fail("experts", f"expected a list of 1 to {MAX_EXPERTS} experts")
    return [
        Fields(entry, f"{fields.where}.experts[{index}]", tolerant=fields.tolerant)
        for index, entry in enumerate(entries)
    ]


def _expert(index: int, fields: Fields, container: Container) -> Expert:
    expert: Expert
    name = fields.string("name")
    kind = fields.choice("kind", ("lora", "reference", "delta"))
    if kind == "reference":
        expert = fields.build(LoraReference, name, fields.string("path"), fields.digest("header_sha256"))
    elif kind == "delta":
        expert = fields.build(DeltaReference, name, fields.string("path"), fields.digest("header_sha256"))
    else:
        entries = fields.parameters("modules")
        modules = {
            module: _matrix(entries.nested(module), f"experts/{index}/{module}", container) for module in entries.value
        }
        expert = fields.build(Lora, name, fields.optional_string("license"), modules)
    fields.done()
    return expert


def _matrix(fields: Fields, owner: str, container: Container) -> LoraMatrix:
    out_features, in_features = fields.matrix_shape("shape")
    rank, dtype = fields.natural("rank", least=1), fields.choice("dtype", NUMPY_DTYPES)
    scale = _number(fields, "scale")
    a = _array(fields, owner, "a", dtype, (rank, in_features), container)
    b = _array(fields, owner, "b", dtype, (out_features, rank), container)
    _parts(fields, "a", "b")
    fields.done()
    return fields.build(LoraMatrix, a, b, scale)


def _gate(fields: Fields, count: int, container: Container) -> FixedGate | TokenGate:
    gate: FixedGate | TokenGate
    if fields.choice("kind", ("fixed", "token")) == "fixed":
        gate = FixedGate(fields.numbers("weights"))
    else:
        hidden = fields.natural("hidden_size", least=1)
        temperature = _number(fields, "temperature")
        entries = fields.parameters("blocks")
        blocks = {name: _block(entries.nested(name), name, (count, hidden), container) for name in entries.value}
        gate = fields.build(TokenGate, blocks, temperature)
    fields.done()
    return gate


def _block(fields: Fields, name: str, shape: tuple[int, int], container: Container) -> BlockGate:
    dtype, owner = fields.choice("dtype", NUMPY_DTYPES), f"gate/{name}"
    weight = _array(fields, owner, "weight", dtype, shape, container)
    bias = _array(fields, owner, "bias", dtype, shape[:1], container)
    _parts(fields, "weight", "bias")
    fields.done()
    return fields.build(BlockGate, weight, bias)


def _array(
    fields: Fields, owner: str, part: str, dtype: str, shape: tuple[int, ...], container: Container
) -> ExactArray:
    values = exactly(fields, stored_array(container, f"{owner}.{part}", dtype), math.prod(shape), part)
    return fields.build(ExactArray, values.reshape(shape), dtype)


def _number(fields: Fields, key: str) -> float:
    """One finite number, with the checks of a list of them."""
    return Fields({key: [fields.get(key)]}, fields.where).numbers(key)[0]


def _parts(fields: Fields, *parts: str) -> None:
    digests = fields.nested("sha256")
    for part in parts:
        digests.digest(part)
    digests.done()


def _digests(fields: Fields) -> dict[str, str]:
    """Digest by tensor, of a header that has been decoded."""
    owners: dict[str, Mapping[str, Any]] = {}
    for index, expert in enumerate(fields.value["experts"]):
        if expert["kind"] == "lora":
            owners |= {f"experts/{index}/{name}": entry for name, entry in expert["modules"].items()}
    if fields.value["gate"]["kind"] == "token":
        owners |= {f"gate/{name}": entry for name, entry in fields.value["gate"]["blocks"].items()}
    return {
        f"{owner}.{part}": value
        for owner, entry in owners.items()
        for part, value in entry["sha256"].items()
        if part in ("a", "b", "weight", "bias")  # a newer minor version may bring others
    }


def _require_all_tensors(container: Container, claimed: set[str]) -> None:
    if unclaimed := sorted(container.tensors.keys() - claimed):
        raise FormatError(f"{container.path}: tensor {unclaimed[0][:200]} belongs to no expert and no gate")


def _resolved_delta(path: Path, reference: DeltaReference, fusion: Fusion) -> DeltaExpert:
    delta = Delta.open(path)
    if delta.header_sha256 != reference.header_sha256:
        raise FormatError(f"{path}: is another file than the one that the fusion was made with")
    if delta.header.base.root != fusion.base.root:
        raise FormatError(f"{path}: delta of base {delta.header.base.name}, the fusion is of {fusion.base.name}")
    return DeltaExpert(reference.name, delta)


def _resolved_lora(path: Path, reference: LoraReference, fusion: Fusion) -> Lora:
    container = Container.open(path)
    other = _decode(container)
    if header_digest(container.metadata) != reference.header_sha256:
        raise FormatError(f"{path}: is another file than the one that the fusion was made with")
    if other.base.root != fusion.base.root:
        raise FormatError(f"{path}: LoRA of base {other.base.name}, the fusion is of {fusion.base.name}")
    if len(other.experts) != 1 or not other.loras or other.gate != FixedGate((1.0,)):
        raise FormatError(f"{path}: expected one inlined LoRA with the fixed weight 1")
    return other.loras[0]
