# SPDX-License-Identifier: Apache-2.0
"""Constants and rules of the layout that several modules share (SPEC.md, "Limits")."""

import re

__all__ = [
    "ALIGNMENT",
    "BAND_ALIGNMENT",
    "FILES_PREFIX",
    "MAX_BANDS",
    "MAX_DIMENSIONS",
    "MAX_EXTENT",
    "MAX_GROUP_SIZE",
    "MAX_HEADER",
    "is_file_name",
    "is_parameter_name",
    "padded",
]

# Where the data section begins and every tensor in it; also the unit of their lengths.
ALIGNMENT = 256
# Where a band begins within its codes tensor.
BAND_ALIGNMENT = 16
MAX_BANDS = 8
MAX_GROUP_SIZE = 1 << 16
# No extent may exceed this: row indices are int32, and the product of two extents fits 64 bits.
MAX_EXTENT = (1 << 31) - 1
MAX_DIMENSIONS = 16
# Bytes of a header, as in the safetensors library: bounds what parsing one can allocate.
MAX_HEADER = 100_000_000
FILES_PREFIX = "files/"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PARAMETER_NAME = re.compile(r"(?!files/)[!-~]{1,512}")


def padded(count: int, alignment: int = ALIGNMENT) -> int:
    """`count` rounded up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def is_file_name(name: str) -> bool:
    """Whether a carried file may be called so: a plain name that no reader can be led astray by."""
    return _FILE_NAME.fullmatch(name) is not None


def is_parameter_name(name: str) -> bool:
    """Whether a parameter may be called so: printable ASCII without spaces, so that the root digest is unambiguous."""
    return _PARAMETER_NAME.fullmatch(name) is not None
