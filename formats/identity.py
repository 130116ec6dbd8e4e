# SPDX-License-Identifier: Apache-2.0
"""Which base a delta belongs to: a digest of every tensor, a root over all, a fingerprint cheap to check."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["BaseIdentity", "TensorIdentity", "root_digest", "sampled_fingerprint", "tensor_digest"]

SAMPLE_BYTES = 64


@dataclass(frozen=True)
class TensorIdentity:
    """One tensor of the base.

    Attributes:
        sha256: of its bytes as stored, in hexadecimal.
        dtype: the format's name, such as `BF16`.
        shape: its extents.
    """

    sha256: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))


@dataclass(frozen=True)
class BaseIdentity:
    """The base checkpoint.

    Attributes:
        name: what it calls itself.
        revision: of its repository, if known.
        license: as its model card states it, if it does.
        root: `root_digest` of its tensors.
        fingerprint: `sampled_fingerprint` of its tensors.
        tensors: every tensor that base + delta needs.
    """

    name: str
    revision: str | None
    license: str | None
    root: str
    fingerprint: str
    tensors: Mapping[str, TensorIdentity]


def tensor_digest(raw: bytes | memoryview) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(raw).hexdigest()


def root_digest(tensors: Mapping[str, TensorIdentity]) -> str:
    """SHA-256 over one line per tensor, sorted by name: `name dtype shape sha256`, shape as `2x3`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(f"{name} {entry.dtype} {'x'.join(map(str, entry.shape))} {entry.sha256}\n".encode())
    return digest.hexdigest()


def sampled_fingerprint(raws: Mapping[str, bytes | memoryview]) -> str:
    """SHA-256 over a few bytes of every tensor, sorted by name.

    For each tensor of n bytes: its name in UTF-8, n as 8 little-endian bytes, then up to 64 bytes each at 0, at
    max(0, n // 2 - 32) and at max(0, n - 64).
    """
    digest = hashlib.sha256()
    with _without_readahead(raws.values()):
        for name in sorted(raws):
            raw = raws[name]
            size = len(raw)
            digest.update(name.encode() + size.to_bytes(8, "little"))
            for start in (0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)):
                digest.update(raw[start : start + SAMPLE_BYTES])
    return digest.hexdigest()


@contextmanager
def _without_readahead(raws: Iterable[bytes | memoryview]) -> Iterator[None]:
    """Tells the system that mapped files are read here and there: it would fetch megabytes around every sample."""
    views = (raw.obj for raw in raws if isinstance(raw, memoryview))
    maps = {id(view): view for view in views if isinstance(view, mmap.mmap)}.values()
    advise = hasattr(mmap, "MADV_RANDOM")
    for mapped in maps if advise else ():
        mapped.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        for mapped in maps if advise else ():
            mapped.madvise(mmap.MADV_NORMAL)
