# SPDX-License-Identifier: Apache-2.0
"""Errors of the converter; every message is one line that names the file, tensor or option."""

from deltaweave.formats import DeltaweaveError

__all__ = ["CalibrationError", "CheckpointError", "OutputError", "RecipeError", "ResumeError"]


class CheckpointError(DeltaweaveError, ValueError):
    """A checkpoint that is incomplete, damaged, or does not fit its counterpart."""


class RecipeError(DeltaweaveError, ValueError):
    """A recipe, band list or ratio that cannot be carried out."""


class CalibrationError(DeltaweaveError, ValueError):
    """Calibration text that cannot be used."""


class OutputError(DeltaweaveError, OSError):
    """An output that exists or cannot be written."""


class ResumeError(DeltaweaveError, RuntimeError):
    """Unfinished work that does not belong to the options given now."""
