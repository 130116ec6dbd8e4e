# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them, the same in the terminal and in reports."""

from __future__ import annotations

__all__ = ["format_bytes", "one_over", "percent"]


def format_bytes(count: float) -> str:
    """A byte count: 870 MB, 1.2 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def one_over(ratio: float | None) -> str:
    """A ratio as 1/N; nothing for None and zero."""
    return "" if not ratio else "1" if ratio == 1 else f"1/{1 / ratio:.1f}"


def percent(share: float) -> str:
    """A share in percent, to a tenth."""
    return f"{100 * share:.1f} %"
