# SPDX-License-Identifier: Apache-2.0
"""Typed access to parsed JSON, with errors that name the key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from deltaweave.formats.errors import FormatError
from deltaweave.formats.layout import MAX_DIMENSIONS, MAX_EXTENT, is_parameter_name

__all__ = ["Fields"]

HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
Built = TypeVar("Built")


class Fields:
    """A JSON object being read.

    Every value is asked for by key and type; `done` refuses keys that nobody asked for.
    """

    def __init__(self, value: Any, where: str, *, tolerant: bool = False) -> None:
        """Wraps `value`; `where` starts every error; `tolerant` lets unknown keys pass (a newer minor version)."""
        if not isinstance(value, dict):
            raise FormatError(f"{where}: {type(value).__name__}, expected an object")
        self.value, self.where, self.tolerant = value, where, tolerant
        self._asked: set[str] = set()

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raises FormatError for a key."""
        raise FormatError(f"{self.where}.{key}: {problem}")

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.value.get(key) is not None

    def get(self, key: str) -> Any:
        """A required value of any type."""
        self._asked.add(key)
        if key not in self.value:
            self.fail(key, "missing")
        return self.value[key]

    def string(self, key: str) -> str:
        """A required string."""
        value = self.get(key)
        if not isinstance(value, str):
            self.fail(key, f"{type(value).__name__}, expected a string")
        return value

    def optional_string(self, key: str) -> str | None:
        """A string or null."""
        return None if self.get(key) is None else self.string(key)

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """A string out of a set."""
        value = self.string(key)
        if value not in allowed:
            self.fail(key, f"{value[:60]!r}, expected one of {', '.join(sorted(allowed))}")
        return value

    def digest(self, key: str) -> str:
        """A SHA-256 in hexadecimal."""
        value = self.string(key)
        if not HEX_DIGEST.fullmatch(value):
            self.fail(key, "expected 64 hexadecimal digits")
        return value

    def natural(self, key: str, *, least: int = 0, most: int = MAX_EXTENT) -> int:
        """An integer within bounds."""
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:
            self.fail(key, f"expected an integer in [{least}, {most}]")
        return value

    def shape(self, key: str, *, least: int = 1) -> tuple[int, ...]:
        """A list of extents, each at least `least`."""
        value = self.get(key)
        if not isinstance(value, list) or not all(type(item) is int and least <= item <= MAX_EXTENT for item in value):
            self.fail(key, f"expected a list of integers in [{least}, {MAX_EXTENT}]")
        if len(value) > MAX_DIMENSIONS:
            self.fail(key, f"{len(value)} dimensions, expected at most {MAX_DIMENSIONS}")
        return tuple(value)

    def matrix_shape(self, key: str) -> tuple[int, int]:
        """Two extents."""
        shape = self.shape(key)
        if len(shape) != 2:
            self.fail(key, f"{len(shape)} dimensions, expected 2")
        return shape[0], shape[1]

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.get(key)
        if not isinstance(value, list) or not all(_is_finite(item) for item in value):
            self.fail(key, "expected a list of finite numbers")
        return tuple(float(item) for item in value)

    def quality(self, key: str) -> dict[str, float]:
        """Named finite numbers; missing means none."""
        self._asked.add(key)
        value = self.value.get(key, {})
        if not isinstance(value, dict) or not all(_is_finite(item) for item in value.values()):
            self.fail(key, "expected an object of finite numbers")
        return {name: float(item) for name, item in value.items()}

    def object(self, key: str) -> dict[str, Any]:
        """A required object, as it is."""
        value = self.get(key)
        if not isinstance(value, dict):
            self.fail(key, f"{type(value).__name__}, expected an object")
        return value

    def nested(self, key: str) -> Fields:
        """A required object to be read in turn."""
        return Fields(self.get(key), f"{self.where}.{key}", tolerant=self.tolerant)

    def parameters(self, key: str) -> Fields:
        """A required object whose keys are names of parameters."""
        fields = self.nested(key)
        for name in fields.value:
            if not is_parameter_name(name):
                fields.fail(name[:200], "not an allowed parameter name")
        return fields

    def build(self, make: Callable[..., Built], *arguments: Any, part: str = "") -> Built:
        """Calls `make`; its FormatError gets the name of this object, or of a part of it."""
        try:
            return make(*arguments)
        except FormatError as error:
            raise FormatError(f"{self.where}{part and '.'}{part}: {error}") from error

    def done(self) -> None:
        """Refuses unknown keys, unless a newer minor version may have brought them."""
        unknown = sorted(set(self.value) - self._asked)
        if unknown and not self.tolerant:
            raise FormatError(f"{self.where}: unknown key {unknown[0][:60]!r}")


def _is_finite(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
