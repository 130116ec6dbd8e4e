# SPDX-License-Identifier: Apache-2.0
"""What a file says of one parameter: a factored or dense delta, changed rows, a value, or a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from deltaweave.formats.errors import FormatError
from deltaweave.formats.layout import MAX_DIMENSIONS, MAX_EXTENT, padded
from deltaweave.formats.matrix import Band, ByteCount, PackedMatrix, matrix_bytes
from numpy.typing import NDArray

__all__ = [
    "BaseRecord",
    "DenseRecord",
    "ExactArray",
    "ExactDtype",
    "FactoredRecord",
    "Record",
    "ReplaceRecord",
    "RowsRecord",
    "apply_record",
    "dense_bytes",
    "factored_bytes",
    "published_alpha",
]

ExactDtype = Literal["F32", "F16", "BF16"]
NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}


@dataclass(frozen=True)
class ExactArray:
    """Values as the checkpoint has them.

    Attributes:
        data: float32, float16, or uint16 holding bfloat16 bit patterns, which numpy has no type for.
        dtype: which of them.
    """

    data: NDArray[np.generic]
    dtype: ExactDtype

    def __post_init__(self) -> None:
        if self.data.dtype != NUMPY_DTYPES[self.dtype]:
            raise FormatError(
                f"array of {self.data.dtype} as {self.dtype}, expected {NUMPY_DTYPES[self.dtype].__name__}"
            )

    def to_float32(self) -> NDArray[np.float32]:
        """The values in float32, exactly."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.data.astype(np.float32)


@dataclass(frozen=True)
class FactoredRecord:
    """A delta `u^T diag(sigma) v` of a matrix [out_features, in_features].

    Attributes:
        shape: (out_features, in_features) of the tuned parameter.
        u: [rank, out_features], one row per singular vector.
        v: [rank, in_features].
        sigma: [rank] float32.
        quality: relative errors and the like, as the converter measured them.
    """

    shape: tuple[int, int]
    u: PackedMatrix
    v: PackedMatrix
    sigma: NDArray[np.float32]
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if [piece.band for piece in self.u.bands] != [piece.band for piece in self.v.bands]:
            raise FormatError("u and v of a factored record must share their bands")
        if self.u.group_size != self.v.group_size or self.v.group_size is None:
            raise FormatError("u and v of a factored record must share a group size")
        lengths = (self.u.length, self.v.length)
        if lengths != self.shape or self.sigma.shape != (self.u.rows,):
            raise FormatError(
                f"factored record of shape {self.shape} has u and v of length {lengths} and {self.sigma.size} singular "
                f"values for {self.u.rows} ranks"
            )
        if self.sigma.dtype != np.float32 or not np.isfinite(self.sigma).all():
            raise FormatError("sigma has values that are not finite float32")

    @property
    def bands(self) -> tuple[Band, ...]:
        """The bands that u and v share."""
        return tuple(piece.band for piece in self.v.bands)

    @property
    def rank(self) -> int:
        """Number of singular vectors."""
        return self.u.rows

    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(u [rank, out_features], sigma [rank], v [rank, in_features]), float32."""
        return self.u.dequantize(), self.sigma, self.v.dequantize()

    def dequantize(self) -> NDArray[np.float32]:
        """The delta, [out_features, in_features] float32."""
        u, sigma, v = self.factors()
        with np.errstate(over="ignore", invalid="ignore"):  # singular values of a lying file may overflow: no warning
            product: NDArray[np.float32] = u.T @ (sigma[:, None] * v)
        return product


@dataclass(frozen=True)
class DenseRecord:
    """A quantized delta of a whole matrix: one-bit deltas, low-bit embeddings.

    Attributes:
        shape: of the tuned parameter.
        matrix: [shape[0], shape[1]] codes in one band.
        quality: as in FactoredRecord.
    """

    shape: tuple[int, int]
    matrix: PackedMatrix
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bits = [piece.band.bits for piece in self.matrix.bands]
        if (self.matrix.rows, self.matrix.length) != self.shape or len(bits) != 1 or bits[0] == 16:
            raise FormatError(
                f"dense record of shape {self.shape} needs one band of {self.shape[0]} rows of {self.shape[1]} values "
                "in 1 to 8 bits"
            )

    def dequantize(self) -> NDArray[np.float32]:
        """The delta, [rows, columns] float32."""
        return self.matrix.dequantize()


@dataclass(frozen=True)
class RowsRecord:
    """Changed and added rows, replaced by their exact tuned values.

    Attributes:
        shape: of the tuned parameter; it may have more or fewer rows than the base's.
        indices: [n] int32, strictly rising.
        values: [n, columns].
        quality: as in FactoredRecord.
    """

    shape: tuple[int, int]
    indices: NDArray[np.int32]
    values: ExactArray
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.indices.dtype != np.int32:
            raise FormatError(f"row indices of {self.indices.dtype}, expected int32")
        _require_extents(self.shape)
        if self.values.data.shape != (len(self.indices), self.shape[1]):
            raise FormatError(
                f"rows record has {len(self.indices)} indices and values of shape {self.values.data.shape}"
            )
        if len(self.indices) and (
            self.indices[0] < 0
            or self.indices[-1] >= self.shape[0]
            or (np.diff(self.indices.astype(np.int64)) <= 0).any()
        ):
            raise FormatError(f"row indices must rise strictly within [0, {self.shape[0]})")


@dataclass(frozen=True)
class ReplaceRecord:
    """A whole parameter at its exact tuned value: norms and biases.

    Attributes:
        values: of the parameter's own shape.
        quality: as in FactoredRecord.
    """

    values: ExactArray
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_extents(self.values.data.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.values.data.shape


@dataclass(frozen=True)
class BaseRecord:
    """A parameter that differs and was left at the base's value on purpose.

    Attributes:
        shape: of the tuned parameter.
        quality: as in FactoredRecord.
    """

    shape: tuple[int, ...]
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_extents(self.shape)


Record = FactoredRecord | DenseRecord | RowsRecord | ReplaceRecord | BaseRecord


def apply_record(record: Record, base: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The tuned value of a parameter.

    Args:
        record: what the file says.
        base: the base's value in float32; rows that it lacks count as zero, rows beyond the record's shape are
            dropped. None counts as zeros.

    Raises:
        FormatError: a base whose other dimensions differ, or a shape beyond this machine's memory.
    """
    if isinstance(record, ReplaceRecord):
        return record.values.to_float32()
    tuned = _resized(base, record.shape)
    if isinstance(record, RowsRecord):
        tuned[record.indices] = record.values.to_float32()
    elif not isinstance(record, BaseRecord):
        tuned += record.dequantize()
    return tuned


def _require_extents(shape: tuple[int, ...]) -> None:
    if len(shape) > MAX_DIMENSIONS or not all(1 <= extent <= MAX_EXTENT for extent in shape):
        raise FormatError(f"shape {list(shape)}, expected at most {MAX_DIMENSIONS} extents, each in [1, {MAX_EXTENT}]")


def _resized(base: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if base is not None and base.shape[1:] != shape[1:]:
        raise FormatError(f"base of shape {list(base.shape)}, the record expects {list(shape)}")
    try:
        value = np.zeros(shape, dtype=np.float32)
    except (MemoryError, ValueError) as error:  # of rows and base records the shape is tied to no stored bytes
        raise FormatError(f"a parameter of shape {list(shape)} does not fit into memory") from error
    if base is not None:
        rows = min(len(base), len(value))
        value[:rows] = base[:rows]
    return value


def factored_bytes(shape: tuple[int, int], bands: Sequence[Band], group_size: int) -> ByteCount:
    """Stored bytes of a factored record, without building it."""
    rank = sum(band.rank for band in bands)
    sigma = ByteCount(sigma=4 * rank, padding=padded(4 * rank) - 4 * rank)
    return sigma + matrix_bytes(bands, shape[0], group_size) + matrix_bytes(bands, shape[1], group_size)


def published_alpha(shape: tuple[int, int], bands: Sequence[Band]) -> float:
    """The paper's compression ratio of one matrix: code bits alone over 16-bit weights (arXiv 2406.08903)."""
    out_features, in_features = shape
    bits = sum(band.bits * band.rank for band in bands)
    return bits * (out_features + in_features) / (16 * out_features * in_features)


def dense_bytes(shape: tuple[int, int], bits: int, group_size: int | None) -> ByteCount:
    """Stored bytes of a dense record with an affine grid, without building it."""
    return matrix_bytes([Band(bits, shape[0])], shape[1], group_size)
