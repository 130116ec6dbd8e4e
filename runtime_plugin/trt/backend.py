# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT is used: TensorRT where it is installed, else TensorRT-RTX; and our plugin inside it.

Their Python interfaces agree but for what `Backend` hides. The plugin is found beside libdeltaweave, or at
DELTAWEAVE_TRT_LIBRARY.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from deltaweave.runtime_plugin.library import find_library
from deltaweave.runtime_plugin.trt.errors import EngineError

__all__ = ["PLUGIN_VERSION", "Backend", "find_plugin", "load_backend"]

PLUGIN_VERSION = "1"  # kVersion in plugin/op.h
PLUGIN_NAMESPACE = "deltaweave"
ENVIRONMENT = "DELTAWEAVE_TRT_LIBRARY"
PLUGIN_FILE, ALIAS_FILE = "libdeltaweave_trt.so", "libdeltaweave_rtx_alias.so"
RTX_LIBRARY = "libtensorrt_rtx.so"
Name = Literal["tensorrt", "tensorrt_rtx"]
# In the order of preference.
MODULES: dict[str, Literal["tensorrt", "tensorrt_rtx"]] = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
    "tensorrt_rtx_bindings": "tensorrt_rtx",
}
LAST_ERROR_BYTES = 4096


def find_plugin() -> Path | None:
    """The plugin of DELTAWEAVE_TRT_LIBRARY, else the one beside libdeltaweave, else None."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    library = find_library()
    beside = library.with_name(PLUGIN_FILE) if library else None
    return beside if beside and beside.exists() else None


@dataclass(frozen=True)
class Backend:
    """A TensorRT with the plugin registered.

    Attributes:
        api: its Python module.
        name: tensorrt or tensorrt_rtx.
        version: as it calls itself; a plan runs under the version that built it and no other.
        plugin: path of the plugin's library.
    """

    api: Any
    name: Name
    version: str
    plugin: Path

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds for other GPUs than the one at hand."""
        return self.name == "tensorrt_rtx"

    def plugin_digest(self) -> str:
        """SHA-256 of the plugin's library."""
        return hashlib.sha256(self.plugin.read_bytes()).hexdigest()

    def take_error(self) -> str:
        """The plugin's last message, which is then forgotten; empty if nothing failed."""
        text = ctypes.create_string_buffer(LAST_ERROR_BYTES)
        function = _load(self.plugin).deltaweave_trt_last_error
        function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_size_t], ctypes.c_size_t
        function(text, LAST_ERROR_BYTES)
        return text.value.decode()

    def logger(self, write: Callable[[str], None] | None = None) -> Any:
        """An ILogger that keeps errors in `messages` and hands warnings and errors to `write`."""
        api = self.api

        class Logger(api.ILogger):  # type: ignore[misc, name-defined]  # the module is chosen at run time
            def __init__(self) -> None:
                api.ILogger.__init__(self)
                self.messages: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= api.ILogger.ERROR:
                    self.messages.append(message)
                if write and severity <= api.ILogger.WARNING:
                    write(message)

        return Logger()

    def failure(self, what: str, logger: Any) -> EngineError:
        """What failed, with the plugin's message if it has one, else TensorRT's first."""
        reason = self.take_error() or (logger.messages[0] if logger.messages else "TensorRT gave no reason")
        logger.messages.clear()
        return EngineError(f"{what}: {reason}")


@cache
def load_backend() -> Backend:
    """Loads TensorRT and registers the plugin, once in a process.

    Raises:
        EngineError: neither TensorRT is installed, or the plugin is missing or does not load.
    """
    plugin = find_plugin()
    if plugin is None:
        raise EngineError(f"{PLUGIN_FILE} was not built; build it with TensorRT's headers, or set {ENVIRONMENT}")
    module, name = _import_tensorrt()
    if name == "tensorrt_rtx":
        _require_rtx_library(plugin)
    library = find_library()
    if library is not None:
        _load(library)  # the plugin needs it by name: the one in use already is taken
    _load(plugin)
    registry = module.get_plugin_registry()
    registry.load_library(str(plugin))
    if not any(creator.plugin_namespace == PLUGIN_NAMESPACE for creator in registry.all_creators):
        raise EngineError(f"{plugin}: {name} {module.__version__} found no plugin in it")
    return Backend(module, name, module.__version__, plugin)


def _import_tensorrt() -> tuple[Any, Name]:
    for module, name in MODULES.items():
        try:
            return importlib.import_module(module), name
        except ImportError:
            continue
    raise EngineError("TensorRT is not installed; pip install 'deltaweave[tensorrt]', or NVIDIA's tensorrt")


def _require_rtx_library(plugin: Path) -> None:
    """Makes the name known under which TensorRT-RTX's ONNX parser opens its library; without it the process aborts."""
    for alias in (None, plugin.with_name(ALIAS_FILE)):
        if alias is not None and alias.exists():
            ctypes.CDLL(str(alias))
        try:
            if hasattr(ctypes.CDLL(RTX_LIBRARY), "getPluginRegistry"):
                return
        except OSError:
            continue
    raise EngineError(
        f"{RTX_LIBRARY} cannot be opened, which TensorRT-RTX's ONNX parser needs; expected {ALIAS_FILE} beside "
        f"{plugin}, or that name in LD_LIBRARY_PATH"
    )


@cache
def _load(path: Path) -> Any:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path} does not load: {error}") from error
