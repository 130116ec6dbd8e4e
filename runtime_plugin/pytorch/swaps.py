# SPDX-License-Identifier: Apache-2.0
"""Attributes and hooks that a model has for a while."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch.utils.hooks import RemovableHandle

__all__ = ["Attachment", "Swap"]


@dataclass(frozen=True)
class Swap:
    """An attribute of a module or configuration, and the value it is to take."""

    owner: Any
    name: str
    value: Any


class Attachment:
    """A model that computes something else; `detach` (or leaving the `with` block) gives back the very objects."""

    def __init__(self, swaps: Iterable[Swap], handles: Iterable[RemovableHandle] = ()) -> None:
        """Carries out the swaps; `handles` are those of hooks that go with them. Use `attach`."""
        self._handles = list(handles)
        self._undo: list[Swap] = []
        for swap in swaps:
            self._undo.append(Swap(swap.owner, swap.name, getattr(swap.owner, swap.name)))
            setattr(swap.owner, swap.name, swap.value)

    def detach(self) -> None:
        """Restores the base, in reverse order; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        while self._undo:
            swap = self._undo.pop()
            setattr(swap.owner, swap.name, swap.value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
