# SPDX-License-Identifier: Apache-2.0
"""What libdeltaweave's status codes become."""

from __future__ import annotations

from deltaweave.formats.errors import DeltaweaveError

__all__ = ["ArenaFullError", "LibraryError"]


class LibraryError(DeltaweaveError, RuntimeError):
    """The library is missing or refused a call; its message says what came and what was expected."""


class ArenaFullError(LibraryError):
    """No slot, or not enough free bytes, for another tenant."""
