# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision deltas of fine-tuned language models: compress, check and run many fine-tunes of one base."""

from importlib.metadata import version

from deltaweave.converter import CompressionOptions, Recipe, apply, compress
from deltaweave.formats import Delta, DeltaweaveError

__version__ = version("deltaweave")

__all__ = ["CompressionOptions", "Delta", "DeltaweaveError", "Recipe", "apply", "compress"]
