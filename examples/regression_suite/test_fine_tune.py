# SPDX-License-Identifier: Apache-2.0
"""A fine-tune in a regression suite: pytest examples/regression_suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def test_fine_tune(validate: Callable[..., object], models: Path) -> None:
    pair = {"base": models / "base", "tuned": models / "tuned", "prompts": HERE / "prompts.jsonl"}
    validate(models / "tuned.safetensors", **pair, thresholds=HERE / "thresholds.yaml", max_new_tokens=16)
