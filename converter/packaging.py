# SPDX-License-Identifier: Apache-2.0
"""Finished parts to the delta file: header, carried files, model card."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaweave.converter.card import write_card
from deltaweave.converter.checkpoint import EMBEDDING, STORED_NAMES, Checkpoint
from deltaweave.converter.plan import Pair
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import Architecture, BaseIdentity, Header, Record, TunedInfo, write_delta

__all__ = ["package"]

# Besides weights, what makes a model behave as it does; carried where it differs from the base's.
CARRIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def package(
    output: Path,
    plan: Pair,
    records: Mapping[str, Record],
    identity: BaseIdentity,
    method: Mapping[str, Any],
    calibration: CalibrationData | None,
    *,
    force: bool,
    command: str | None,
) -> None:
    """Writes the delta file and the model card beside it.

    Args:
        output: the delta file.
        plan: the pair.
        records: of all parameters that differ.
        identity: the base's digests.
        method: what the header says of the method, its recipe and its seed.
        calibration: the data used, None without.
        force: replace an existing output.
        command: the command line, for the card.
    """
    header = Header(
        tool=f"deltaweave {version('deltaweave')}",
        base=identity,
        tuned=_tuned_info(plan.tuned),
        architecture=Architecture(plan.tuned.model_type, plan.tuned.tied),
        method=dict(method),
        calibration=_calibration_info(calibration),
    )
    write_delta(output, header, records, files=_carried_files(plan), force=force)
    write_card(output, command)


def _tuned_info(tuned: Checkpoint) -> TunedInfo:
    return TunedInfo(
        name=tuned.display_name,
        revision=tuned.config.get("_commit_hash"),
        license=tuned.license,
        dtype=STORED_NAMES[tuned.dtype(EMBEDDING)],
        bytes=tuned.tensor_bytes,
    )


def _calibration_info(calibration: CalibrationData | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    samples, length = calibration.tokens.shape
    return {
        "source": calibration.source,
        "sha256": calibration.sha256,
        "samples": samples,
        "sequence_length": length,
    }


def _carried_files(plan: Pair) -> dict[str, bytes]:
    carried = {}
    for name in CARRIED_FILES:
        file, original = plan.tuned.folder / name, plan.base.folder / name
        if file.is_file() and not (original.is_file() and original.read_bytes() == file.read_bytes()):
            carried[name] = file.read_bytes()
    return carried
