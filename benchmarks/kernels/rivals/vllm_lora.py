# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton LoRA kernels, shrink and expand, at the delta's rank in bf16.

The two kernels are read from an unpacked vLLM wheel; what they import from the rest of vLLM (settings, logger,
platform) is replaced by the few names below, so that vLLM itself need not be installed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .cases import Case
from .loading import rival_folder
from .torch_rivals import padded_rank
from .workload import Workload, fastest, normal

__all__ = ["VllmLora", "VllmLoraTuned", "vllm_ops"]

Config = dict[str, int | None]


class VllmLora(Workload):
    """With the block sizes that vLLM takes where no tuned file is named (it ships none)."""

    name = "vllm-lora"
    label = "vLLM LoRA kernels, bf16, its defaults"

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        _check_offsets(case)
        super().__init__(case, layers, device)
        self.ops = vllm_ops()
        self.ops.clear_pointers()
        features = case.group.in_features
        self.rank = _common_rank(case)  # its kernels want one rank for all slices
        self.first: list[list[torch.Tensor]] = []
        self.second: list[list[torch.Tensor]] = []
        for _ in range(layers):
            pieces = case.group.slices
            first = [normal((case.tenants, self.rank, features), features**-0.5, device) for _ in pieces]
            for weight, piece in zip(first, pieces, strict=True):
                weight[:, piece.rank :] = 0
            self.first.append(first)
            shapes = [(case.tenants, piece.out_features, self.rank) for piece in pieces]
            self.second.append([normal(shape, self.rank**-0.5, device) for shape in shapes])
        self.h = torch.zeros((len(case.group.slices), case.tokens, self.rank), dtype=torch.float32, device=device)
        meta = self.ops.meta.make(case.tenants, case.tokens, device)
        meta.prepare_tensors(torch.arange(case.tokens, dtype=torch.int32, device=device) % case.tenants)
        self.meta = meta.meta_args(case.tokens, specialize_active_lora=True)
        self.configs: dict[str, Config | None] = self.choose()

    @classmethod
    def warm_case(cls, case: Case) -> Case:
        """Tenants are a grid dimension."""
        return replace(case, tenants=min(case.tenants, 2))

    @classmethod
    def warm_key(cls, case: Case) -> str:
        """What decides block sizes, masks and strides."""
        uneven = len({piece.out_features for piece in case.group.slices}) > 1
        return f"{case.tokens} {case.group.in_features} {len(case.group.slices)} {uneven} {_common_rank(case)}"

    @classmethod
    def layer_bytes(cls, case: Case) -> int:
        """bf16 factors of padded rank."""
        features = case.group.in_features
        return 2 * case.tenants * _common_rank(case) * sum(features + piece.out_features for piece in case.group.slices)

    def outputs(self) -> list[torch.Tensor]:
        """One tensor for all slices."""
        return [self.zeros(self.case.tokens, self.case.group.out_features)]

    def choose(self) -> dict[str, Config | None]:
        """Block sizes of both kernels; None for vLLM's own."""
        return {"shrink": None, "expand": None}

    def launch(self, layer: int) -> None:
        """Shrink into float32, expand onto y."""
        self.shrink(layer, self.configs["shrink"])
        self.expand(layer, self.configs["expand"])

    def shrink(self, layer: int, config: Config | None) -> None:
        """Writes h = x A^T."""
        with self.ops.block_sizes(config):
            self.ops.shrink(self.x, self.first[layer], self.h, *self.meta, 1.0)

    def expand(self, layer: int, config: Config | None) -> None:
        """Adds h B^T to y."""
        with self.ops.block_sizes(config):
            self.ops.expand(self.h, self.second[layer], self.y[0], *self.meta, add_inputs=True)

    def expected(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """Row by row with the tenant's factors."""
        values = []
        for row in rows:
            tenant = row % self.case.tenants
            x = self.x[row : row + 1].double()
            pieces = zip(self.first[layer], self.second[layer], strict=True)
            values.append(torch.cat([x @ a[tenant].double().T @ b[tenant].double().T for a, b in pieces], dim=1))
        return torch.cat(values)


def _config(m: int, n: int, k: int, split: int, stages: int, warps: int = 4) -> Config:
    return {
        "block_m": m,
        "block_n": n,
        "block_k": k,
        "split_k": split,
        "num_warps": warps,
        "num_ctas": 1,
        "group_size_m": 8,
        "num_stages": stages,
        "max_nreg": None,
    }


# Tokens, ranks or outputs, reduction, parts of the reduction, stages, warps.
DECODE = {
    "shrink": [
        _config(16, 16, 256, 16, 2),
        _config(16, 32, 256, 4, 3),
        _config(16, 64, 128, 8, 3),
        _config(16, 64, 64, 4, 4),
        _config(16, 32, 256, 8, 2, 8),
    ],
    "expand": [
        _config(16, 64, 64, 1, 3),
        _config(16, 32, 64, 1, 4),
        _config(16, 128, 64, 1, 3),
        _config(16, 128, 32, 1, 4),
        _config(16, 64, 64, 1, 2, 8),
    ],
}
PREFILL = {
    "shrink": [_config(64, 64, 64, 8, 3), _config(64, 128, 64, 4, 3), _config(128, 64, 64, 4, 3)],
    "expand": [_config(64, 128, 64, 1, 3), _config(128, 128, 64, 1, 3), _config(64, 64, 64, 1, 4)],
}


class VllmLoraTuned(VllmLora):
    """With the fastest of a few block sizes for each kernel and case, chosen here: vLLM's tuning files, in small."""

    name = "vllm-lora-tuned"
    label = "vLLM LoRA kernels, bf16, tuned"
    compiles = True  # and with it what the defaults need

    def choose(self) -> dict[str, Config | None]:
        """Its defaults compete too."""
        table: dict[str, list[Config]] = PREFILL if self.case.tokens > self.case.tenants == 1 else DECODE
        return {
            name: fastest([None, *table[name]], lambda config, run=run: run(0, config))
            for name, run in (("shrink", self.shrink), ("expand", self.expand))
        }


def _check_offsets(case: Case) -> None:
    """Its kernels multiply tenant and stride in 32 bits: past them they read anywhere and the device is lost.

    Raises:
        RuntimeError: the tenants' stacked weights have too many elements.
    """
    widest = max(case.group.in_features, *(piece.out_features for piece in case.group.slices))
    elements = case.tenants * _common_rank(case) * widest
    if elements >= 1 << 31:
        raise RuntimeError(f"a stack of {elements:,} weights is beyond its kernels' 32-bit offsets")


def _common_rank(case: Case) -> int:
    return max(padded_rank(piece.rank) for piece in case.group.slices)


class _Ops:
    """The kernels' Python entry points, loaded from files."""

    def __init__(self, package: Path) -> None:
        sys.modules.update(_stand_ins(package))
        load = importlib.import_module
        self._shrink = load("vllm.lora.ops.triton_ops.lora_shrink_op")
        self._expand = load("vllm.lora.ops.triton_ops.lora_expand_op")
        self._utils = load("vllm.lora.ops.triton_ops.utils")
        self.meta: Any = load("vllm.lora.ops.triton_ops.lora_kernel_metadata").LoRAKernelMeta
        self.shrink: Callable[..., None] = self._shrink.lora_shrink
        self.expand: Callable[..., None] = self._expand.lora_expand

    def clear_pointers(self) -> None:
        """Its tables of addresses outlive the tensors, and another case may get the same addresses."""
        self._utils._LORA_A_PTR_DICT.clear()
        self._utils._LORA_B_PTR_DICT.clear()

    def block_sizes(self, config: Config | None) -> _BlockSizes:
        """A context in which both kernels take these block sizes; None for vLLM's own."""
        return _BlockSizes((self._shrink, self._expand), config)


class _BlockSizes:
    def __init__(self, modules: tuple[ModuleType, ...], config: Config | None) -> None:
        self.modules, self.config = modules, config

    def __enter__(self) -> None:
        self.saved = [module.__dict__["get_lora_op_configs"] for module in self.modules]
        if self.config is not None:
            for module in self.modules:
                module.__dict__["get_lora_op_configs"] = lambda *_, **__: self.config

    def __exit__(self, *_: object) -> None:
        for module, function in zip(self.modules, self.saved, strict=True):
            module.__dict__["get_lora_op_configs"] = function


@cache
def vllm_ops() -> _Ops:
    """The kernels, loaded once.

    Raises:
        RivalMissingError: no unpacked vLLM.
    """
    return _Ops(rival_folder("vllm") / "vllm")


def _stand_ins(package: Path) -> dict[str, ModuleType]:
    """Modules of vLLM: packages that only point at their folder, and the names that the two kernels import."""
    import triton
    import triton.language

    logger: Any = logging.getLogger("vllm")
    logger.warning_once, logger.info_once = logger.debug, logger.debug
    settings = {
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_TUNED_CONFIG_FOLDER": None,
        "VLLM_LORA_DISABLE_PDL": False,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
    }
    platform = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda _: True)
    content: dict[str, dict[str, Any]] = {
        "vllm": {"__path__": [str(package)]},
        "vllm.envs": settings,
        "vllm.logger": {"init_logger": lambda _: logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.utils": {"__path__": []},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2, "cdiv": triton.cdiv},
        "vllm.utils.torch_utils": {"direct_register_custom_op": _no_registration},
    }
    for name in ("vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops"):
        content[name] = {"__path__": [str(package.joinpath(*name.split(".")[1:]))]}
    modules = {}
    for name, attributes in content.items():
        modules[name] = ModuleType(name)
        modules[name].__dict__.update(attributes)
    modules["vllm"].__dict__["envs"] = modules["vllm.envs"]
    return modules


def _no_registration(*_: object, **__: object) -> None:
    """VLLM falls back to the plain function where an op cannot be registered."""
    raise AttributeError
