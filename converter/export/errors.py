# SPDX-License-Identifier: Apache-2.0
"""Errors of the export."""

from __future__ import annotations

from deltaweave.formats import DeltaweaveError

__all__ = ["ExportError"]


class ExportError(DeltaweaveError, ValueError):
    """A model that cannot be exported, or an option outside its range; the message names it."""
