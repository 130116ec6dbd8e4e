# SPDX-License-Identifier: Apache-2.0
"""The delta file: SPEC.md says what it is, this package reads and writes it. Needs numpy, and nothing else of ours."""

from deltaweave.formats.accounting import FileBytes, record_bytes
from deltaweave.formats.container import Container, TensorEntry
from deltaweave.formats.delta import Delta, Problem
from deltaweave.formats.errors import DeltaweaveError, FormatError
from deltaweave.formats.header import FORMAT_VERSION, Architecture, CarriedFile, Header, TunedInfo
from deltaweave.formats.identity import (
    BaseIdentity,
    TensorIdentity,
    root_digest,
    sampled_fingerprint,
    tensor_digest,
)
from deltaweave.formats.layout import MAX_BANDS
from deltaweave.formats.matrix import Band, ByteCount, PackedBand, PackedMatrix
from deltaweave.formats.packing import CODE_BITS, pack_codes, row_bytes, unpack_codes
from deltaweave.formats.records import (
    BaseRecord,
    DenseRecord,
    ExactArray,
    ExactDtype,
    FactoredRecord,
    Record,
    ReplaceRecord,
    RowsRecord,
    apply_record,
    dense_bytes,
    factored_bytes,
)
from deltaweave.formats.sharding import shard
from deltaweave.formats.writer import load_records, save_records, write_delta

__all__ = [
    "CODE_BITS",
    "FORMAT_VERSION",
    "MAX_BANDS",
    "Architecture",
    "Band",
    "BaseIdentity",
    "BaseRecord",
    "ByteCount",
    "CarriedFile",
    "Container",
    "Delta",
    "DeltaweaveError",
    "DenseRecord",
    "ExactArray",
    "ExactDtype",
    "FactoredRecord",
    "FileBytes",
    "FormatError",
    "Header",
    "PackedBand",
    "PackedMatrix",
    "Problem",
    "Record",
    "ReplaceRecord",
    "RowsRecord",
    "TensorEntry",
    "TensorIdentity",
    "TunedInfo",
    "apply_record",
    "dense_bytes",
    "factored_bytes",
    "load_records",
    "pack_codes",
    "record_bytes",
    "root_digest",
    "row_bytes",
    "sampled_fingerprint",
    "save_records",
    "shard",
    "tensor_digest",
    "unpack_codes",
    "write_delta",
]
