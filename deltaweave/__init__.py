# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision deltas of fine-tuned language models: compress, check and run many fine-tunes of one base.

The names below are loaded when they are first used, so that `deltaweave.formats` costs numpy and nothing more.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaweave.converter import CompressionOptions, Policies, Recipe, apply, compress, verify
    from deltaweave.evaluation import compare
    from deltaweave.formats import Delta, DeltaweaveError
    from deltaweave.generation import generate
    from deltaweave.runtime_plugin.pytorch import Arena, attach
    from deltaweave.serving import Prompt, generate_batch
    from deltaweave.validation import validate

__version__ = version("deltaweave")

__all__ = [
    "Arena",
    "CompressionOptions",
    "Delta",
    "DeltaweaveError",
    "Policies",
    "Prompt",
    "Recipe",
    "apply",
    "attach",
    "compare",
    "compress",
    "generate",
    "generate_batch",
    "validate",
    "verify",
]

_HOMES = {
    "converter": ("CompressionOptions", "Policies", "Recipe", "apply", "compress", "verify"),
    "evaluation": ("compare",),
    "formats": ("Delta", "DeltaweaveError"),
    "generation": ("generate",),
    "runtime_plugin.pytorch": ("Arena", "attach"),
    "serving": ("Prompt", "generate_batch"),
    "validation": ("validate",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"deltaweave.{home}"), name)
    raise AttributeError(f"module 'deltaweave' has no attribute {name!r}")
