# SPDX-License-Identifier: Apache-2.0
"""The libdeltaweave that this process uses."""

from __future__ import annotations

from functools import cache

from deltaweave.runtime_plugin.library import Library

__all__ = ["native_library"]


@cache
def native_library() -> Library:
    """Loads it once.

    Raises:
        LibraryError: there is none, or one of another version.
    """
    return Library()
