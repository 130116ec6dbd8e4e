# SPDX-License-Identifier: Apache-2.0
"""LoRA folders as PEFT writes them, and the gate files that LoRA-Flow released."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from deltaweave.converter.errors import CheckpointError
from deltaweave.formats import Container, ExactArray, FormatError
from deltaweave.formats.container import parse_json
from deltaweave.formats.fusion import BlockGate, Lora, LoraMatrix, TokenGate
from deltaweave.formats.records import NUMPY_DTYPES

__all__ = ["read_loraflow_gate", "read_peft_lora"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that change nothing of what the stored matrices compute, or that are read below. Any other one must be off.
KNOWN_SETTINGS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# These initialisations leave the base as it is; others (PiSSA, OLoRA, ...) also change its weights.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Keys of rank_pattern and alpha_pattern are regular expressions out of a file. Nested or many quantifiers could take
# exponential time, so a group may not be repeated, and only three atoms may.
ATOM = r"(?:[\w-]|\\[.dw]|\.|\[[\w-]{1,40}\])"
PATTERN = re.compile(rf"(?=.{{0,300}}$)(?!(?:[^*+]*[*+]){{4}})(?:{ATOM}[*+]?|[()|^$])*+")
LORAFLOW_GATE = re.compile(r"encoder\.layers\.(\d{1,6})\.lora_fusion_gate\.(weight|weight_bias)")


def read_peft_lora(folder: str | Path, *, name: str | None = None) -> Lora:
    """A LoRA out of a folder with `adapter_config.json` and `adapter_model.safetensors`, its values mapped and exact.

    Args:
        folder: as `PeftModel.save_pretrained` writes it.
        name: what to call it; the folder's own name by default.

    Raises:
        CheckpointError: a folder that is incomplete or damaged; a feature that is not a plain LoRA on linear layers
            (DoRA, `modules_to_save`, trained biases or tokens, embeddings, ...), by its name.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        container = Container.open(path)
        modules = {
            module: LoraMatrix(a, b, _scale(folder / CONFIG, config, module, a.data.shape[0]))
            for module, (a, b) in _pairs(container).items()
        }
        return Lora(name or folder.resolve().name, None, modules)
    except FormatError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def read_loraflow_gate(path: str | Path, *, temperature: float = 1.0) -> TokenGate:
    """A gate out of a file with LoRA-Flow's names, `encoder.layers.N.lora_fusion_gate.{weight,weight_bias}`.

    Args:
        path: the file.
        temperature: LoRA-Flow's files hold none; the paper uses 1, and 1.1 for some tasks.

    Raises:
        CheckpointError: a damaged file, other tensors, or layers that are missing.
    """
    try:
        container = Container.open(path)
        layers: dict[int, dict[str, ExactArray]] = {}
        for tensor in container.tensors:
            if not (match := LORAFLOW_GATE.fullmatch(tensor)):
                raise CheckpointError(f"{path}: tensor {tensor[:200]} is no gate of LoRA-Flow")
            layers.setdefault(int(match[1]), {})[match[2]] = _exact(container, tensor)
        blocks = {}
        for layer in range(len(layers)):
            parts = layers.get(layer, {})
            if len(parts) != 2:
                raise CheckpointError(f"{path}: layer {layer} lacks its gate's weight or weight_bias")
            bias = parts["weight_bias"]
            blocks[f"model.layers.{layer}"] = BlockGate(parts["weight"], ExactArray(bias.data.reshape(-1), bias.dtype))
        return TokenGate(blocks, temperature)
    except FormatError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror})") from error
    except FormatError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{path}: peft_type {str(found)[:60]!r}, expected 'LORA'")
    _refuse_features(path, config)
    return config


def _refuse_features(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("use_dora"):
        raise CheckpointError(f"{path}: use_dora is set: DoRA is not supported, it rescales the base's weights too")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise CheckpointError(f"{path}: init_lora_weights {str(start)[:40]!r} is not supported: it changes the base")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias {str(config['bias'])[:40]!r} is not supported, expected 'none'")
    for key in sorted(config.keys() - KNOWN_SETTINGS - {"init_lora_weights", "bias"}):
        if config[key] and key not in _idle_settings(config):
            raise CheckpointError(f"{path}: {key[:60]} is set, a feature that is not supported")


def _idle_settings(config: Mapping[str, Any]) -> set[str]:
    """Settings that PEFT writes with a value although what they belong to is off."""
    idle = {"qalora_group_size"} if not config.get("use_qalora") else set()
    return idle | ({"megatron_core"} if not config.get("megatron_config") else set())


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / rank, or alpha / sqrt(rank); the rank that is stored must be the one that is declared."""
    declared = _pattern(path, config, "rank_pattern", module, config.get("r"))
    alpha = _pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if declared != rank:
        raise CheckpointError(f"{path}: {module} has rank {str(declared)[:20]}, its stored matrices have {rank}")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: {module} has lora_alpha {str(alpha)[:20]!r}, expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(path: Path, config: Mapping[str, Any], key: str, module: str, otherwise: Any) -> Any:
    """The first entry whose expression matches the end of the module's name from a dot on, as PEFT chooses it."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key} is a {type(patterns).__name__}, expected an object")
    for expression, value in patterns.items():
        if not PATTERN.fullmatch(expression):
            raise CheckpointError(
                f"{path}: {key} {expression[:60]!r} is not supported: expected names, dots, alternatives, character "
                "classes and at most three '*' or '+'"
            )
        try:
            if re.match(rf"(.*\.)?({expression})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{path}: {key} {expression[:60]!r} is no regular expression ({error})") from error
    return otherwise


def _pairs(container: Container) -> dict[str, tuple[ExactArray, ExactArray]]:
    """(A, B) by module."""
    found: dict[str, dict[str, ExactArray]] = {}
    for tensor in container.tensors:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", tensor)
        if not match:
            raise CheckpointError(f"{container.path}: tensor {tensor[:200]} is no LoRA of a linear layer")
        found.setdefault(match[1], {})[match[2]] = _exact(container, tensor)
    for module, parts in found.items():
        if len(parts) != 2:
            raise CheckpointError(f"{container.path}: {module[:200]} has lora_{min(parts)} alone")
    return {module: (parts["A"], parts["B"]) for module, parts in found.items()}


def _exact(container: Container, tensor: str) -> ExactArray:
    """A tensor's values as they are stored, in its own shape."""
    entry = container.tensors[tensor]
    if entry.dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{container.path}: tensor {tensor[:200]} has dtype {entry.dtype}, expected a float")
    dtype: Any = entry.dtype
    values = np.frombuffer(container.raw(tensor), NUMPY_DTYPES[dtype]).reshape(entry.shape)
    return ExactArray(values, dtype)
