# SPDX-License-Identifier: Apache-2.0
"""Delta and fusion files: SPEC.md says what they are, this package reads and writes them. Needs numpy alone."""

from deltaweave.formats.accounting import FileBytes, record_bytes
from deltaweave.formats.container import Container, TensorEntry
from deltaweave.formats.delta import Delta, Problem
from deltaweave.formats.errors import DeltaweaveError, FormatError
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
from deltaweave.formats.fusion_file import (
    fusion_digest,
    is_fusion,
    open_tenant,
    parse_fusion,
    read_fusion,
    resolve_expert,
    resolve_fusion,
    verify_fusion,
    write_fusion,
)
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
    published_alpha,
)
from deltaweave.formats.sharding import shard
from deltaweave.formats.writer import load_records, save_records, write_delta

__all__ = [
    "CODE_BITS",
    "FORMAT_VERSION",
    "MAX_BANDS",
    "MAX_EXPERTS",
    "Architecture",
    "Band",
    "BaseIdentity",
    "BaseRecord",
    "BlockGate",
    "ByteCount",
    "CarriedFile",
    "Container",
    "Delta",
    "DeltaExpert",
    "DeltaReference",
    "DeltaweaveError",
    "DenseRecord",
    "ExactArray",
    "ExactDtype",
    "Expert",
    "FactoredRecord",
    "FileBytes",
    "FixedGate",
    "FormatError",
    "Fusion",
    "Header",
    "Lora",
    "LoraMatrix",
    "LoraReference",
    "PackedBand",
    "PackedMatrix",
    "Problem",
    "Record",
    "ReplaceRecord",
    "RowsRecord",
    "TensorEntry",
    "TensorIdentity",
    "TokenGate",
    "TunedInfo",
    "apply_record",
    "dense_bytes",
    "factored_bytes",
    "fusion_digest",
    "is_fusion",
    "load_records",
    "open_tenant",
    "pack_codes",
    "parse_fusion",
    "published_alpha",
    "read_fusion",
    "record_bytes",
    "resolve_expert",
    "resolve_fusion",
    "root_digest",
    "row_bytes",
    "sampled_fingerprint",
    "save_records",
    "shard",
    "tensor_digest",
    "unpack_codes",
    "verify_fusion",
    "write_delta",
    "write_fusion",
]
