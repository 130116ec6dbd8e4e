# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes in a regression suite: the fixture `validate`.

Name the plugin in a `conftest.py`, with `pytest_plugins = ["deltaweave.pytest_plugin"]`, or by `pytest -p
deltaweave.pytest_plugin`. A test then calls the fixture with the arguments of `deltaweave.validate`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deltaweave.validation import Validation

__all__ = ["validate"]


@pytest.fixture
def validate(record_property: Callable[[str, object], None]) -> Callable[..., Validation]:
    """Measures a fine-tune and fails the test if a threshold is broken; numbers go into pytest's JUnit file.

    The function takes the arguments of `deltaweave.validate`, thresholds among them, and gives what was measured.
    """

    def run(delta: str | Path, *, thresholds: Any, **arguments: Any) -> Validation:
        from deltaweave.validation import validate as measure  # torch is loaded by the tests that need it

        validation = measure(delta, thresholds=thresholds, **arguments)
        for reference in validation.measurements:
            for name, value in validation.metrics(reference).items():
                record_property(f"{validation.subject} {reference} {name}", value)
        if not validation.passed:
            lines = "\n".join(f"  {check}" for check in validation.broken)
            pytest.fail(f"{validation.subject} no longer is {validation.tuned}:\n{lines}", pytrace=False)
        return validation

    return run
