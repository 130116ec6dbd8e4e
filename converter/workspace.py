# SPDX-License-Identifier: Apache-2.0
"""The folder of an unfinished compression: finished parts, calibration activations, and the options they belong to.

A part's records appear by one rename. So does the input of a layer, always behind the parts of the layers before it: a
killed run is resumed at the last layer whose input is there. Without calibration there are no inputs, and a run is
resumed by counting parts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaweave.converter.errors import OutputError, ResumeError
from deltaweave.formats import Record, load_records, save_records

__all__ = ["OTHERS_PART", "Workspace", "layer_part", "output_folder"]

OPTIONS_FILE = "options.json"
OTHERS_PART = "others"


def layer_part(layer: int) -> str:
    """The name of a layer's part."""
    return f"layer-{layer:05d}"


class Workspace:
    """`OUTPUT.partial/` beside the output."""

    def __init__(self, folder: Path, options: Mapping[str, Any], *, restart: bool = False) -> None:
        """Opens the folder, or makes it.

        Args:
            folder: where it lies.
            options: JSON values that decide the output's bytes; unfinished work made with others is refused.
            restart: discard unfinished work instead.

        Raises:
            ResumeError: naming the options that changed.
            OutputError: the folder cannot be made.
        """
        self.folder = folder
        if restart and folder.exists():
            shutil.rmtree(folder)
        recorded = self._recorded_options()
        # Compared as JSON has them, so that tuples and lists are one.
        wanted = json.loads(json.dumps(options, sort_keys=True))
        if recorded is None:
            _make(folder)
            _write_durably(folder / OPTIONS_FILE, json.dumps(wanted, indent=1, sort_keys=True))
        elif recorded != wanted:
            changed = sorted(key for key in {*recorded, *wanted} if recorded.get(key) != wanted.get(key))
            raise ResumeError(
                f"{folder}: holds unfinished work with other options ({', '.join(changed)}); "
                "repeat the first command to finish it, or pass --restart to discard it"
            )

    def has(self, part: str) -> bool:
        """Whether a part is finished."""
        return self._part(part).is_file()

    def save(self, part: str, records: Mapping[str, Record]) -> None:
        """Commits a part's records."""
        save_records(self._part(part), records, {})

    def load(self, part: str) -> dict[str, Record]:
        """A finished part's records, mapped, not read."""
        records, _ = load_records(self._part(part))
        return dict(records)

    def activations(self, layer: int) -> Path:
        """Where the input of a layer is saved."""
        return self.folder / f"activations-{layer:05d}.bin"

    @property
    def saved_activations(self) -> int:
        """The last layer whose input is saved, 0 if none is."""
        return max((_layer_of(file) for file in self.folder.glob("activations-*.bin")), default=0)

    def drop_activations(self, layer: int) -> None:
        """Deletes the inputs of layers before `layer`, but for the last that is saved: a resumed run begins there."""
        saved = self.saved_activations
        for file in self.folder.glob("activations-*"):
            if _layer_of(file) < layer and file != self.activations(saved):
                file.unlink(missing_ok=True)

    @property
    def own(self) -> Path:
        """Where the fine-tune's own activations lie beside those behind compressed layers; never resumed from."""
        return self.folder / "own.bin"

    def drop_own(self) -> None:
        """Deletes them."""
        for file in self.folder.glob("own.*"):
            file.unlink()

    def measured(self, layer: int) -> Path:
        """Where activations lie while sensitivities are measured; never resumed from."""
        return self.folder / f"measured-{layer:05d}.bin"

    def drop_measured(self) -> None:
        """Deletes them."""
        for file in self.folder.glob("measured-*"):
            file.unlink(missing_ok=True)

    @property
    def reference(self) -> Path:
        """Where the fine-tune's hidden states on held-out text are kept."""
        return self.folder / "reference.bin"

    @property
    def candidate(self) -> Path:
        """Where a candidate's lie while it is measured."""
        return self.folder / "candidate.bin"

    def drop_candidate(self) -> None:
        """Deletes them."""
        for file in self.folder.glob("candidate.*"):
            file.unlink()

    def attempt(self, name: str) -> Workspace:
        """A folder inside for one of several compressions."""
        return Workspace(self.folder / name, {})

    def cached_json(self, name: str) -> Any | None:
        """A small value kept by `cache_json`, None if there is none."""
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def cache_json(self, name: str, value: Any) -> None:
        """Keeps a small value durably."""
        _write_durably(self.folder / name, json.dumps(value))

    def remove(self) -> None:
        """Deletes the folder once its contents live in the output, or are of no use."""
        shutil.rmtree(self.folder)

    def _part(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _recorded_options(self) -> dict[str, Any] | None:
        file = self.folder / OPTIONS_FILE
        if not file.is_file():
            return None
        recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return recorded


def output_folder(output: Path, *, force: bool) -> Path:
    """Checks early that an output may be written; returns the folder it goes into.

    Raises:
        OutputError: it exists and `force` is not given, or its folder cannot be made.
    """
    if output.is_dir():
        raise OutputError(f"{output}: is a folder, expected a file name such as delta.safetensors")
    if output.exists() and not force:
        raise OutputError(f"{output}: exists (--force replaces it)")
    _make(output.parent)
    return output.parent


def _layer_of(activations: Path) -> int:
    return int(activations.stem.rpartition("-")[2])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error


def _write_durably(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from error
