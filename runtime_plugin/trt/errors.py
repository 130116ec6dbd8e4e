# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with engines."""

from __future__ import annotations

from deltaweave.formats import DeltaweaveError

__all__ = ["EngineError"]


class EngineError(DeltaweaveError, RuntimeError):
    """An engine that cannot be built, does not fit its base, machine or plugin, or refused a step."""
