# SPDX-License-Identifier: Apache-2.0
"""Errors; every message is one line that names the file, tensor or key."""

__all__ = ["DeltaweaveError", "FormatError"]


class DeltaweaveError(Exception):
    """Base of every error that a user of deltaweave can meet."""

    def __str__(self) -> str:
        """The message on one line: names in hostile files may hold line ends and terminal escapes."""
        text = super().__str__()
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class FormatError(DeltaweaveError, ValueError):
    """A file that is not what formats/SPEC.md says it must be, or a record that cannot be written as it says."""
