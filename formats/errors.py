# SPDX-License-Identifier: Apache-2.0
"""Errors; every message is one line that names the file, tensor or key."""

__all__ = ["DeltaweaveError", "FormatError"]


class DeltaweaveError(Exception):
    """Base of every error that a user of deltaweave can meet."""


class FormatError(DeltaweaveError, ValueError):
    """A file that is not what formats/SPEC.md says it must be, or a record that cannot be written as it says."""
