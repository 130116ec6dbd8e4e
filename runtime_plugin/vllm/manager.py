# SPDX-License-Identifier: Apache-2.0
"""What vLLM's model runner has instead of its LoRA manager: adapters are tenants of an arena."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.pytorch import Arena
from deltaweave.runtime_plugin.pytorch.arena import FUSION_RANK
from deltaweave.runtime_plugin.vllm.layers import serve
from deltaweave.runtime_plugin.vllm.metrics import counts_file, remove_at_exit
from deltaweave.runtime_plugin.vllm.options import OptionError, Options, arena_bytes
from deltaweave.runtime_plugin.vllm.step import Step
from deltaweave.runtime_plugin.vllm.table import BaseFiles, RankTable
from deltaweave.runtime_plugin.vllm.tenants import Adapter, Tenants
from huggingface_hub import snapshot_download
from transformers import AutoConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger

__all__ = ["TenantManager"]

# vLLM gives handlers to loggers of its own name alone.
logger = init_logger("vllm.deltaweave")
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class TenantManager:
    """One worker's tenants, under the names by which vLLM's model runner calls them."""

    is_enabled = True

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        """Checks the server's settings; memory is taken when the model is there."""
        self._config = vllm_config
        self._device = device
        self._options = Options.read(vllm_config.additional_config)
        self._tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)
        self._warming = False
        self._tenants: Tenants
        _require_supported(vllm_config)

    def create_lora_manager(self, model: Any, vllm_config: Any = None) -> Any:
        """Takes the arena's memory, so that it is there before vLLM measures what is left, and changes the model."""
        if type(model).__name__ not in FAMILIES:
            raise OptionError(f"{type(model).__name__} is not served, expected one of {', '.join(FAMILIES)}")
        lora, options = self._config.lora_config, self._options
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        table = RankTable(_base_files(self._config), rank, ranks)
        size = arena_bytes(options, table, lora.max_loras)
        arena = Arena(
            table,
            capacity_bytes=size,
            slots=lora.max_loras * (1 + options.delta_experts),
            device=torch.device(self._device),
            max_rank=options.max_rank or max(table.largest_rank(), FUSION_RANK),
            switch_contexts=options.switch_contexts,
        )
        step = Step(arena, tokens=self._tokens, fusions=options.fusions, delta_experts=options.delta_experts)
        self._tenants = Tenants(step, at_once=lora.max_loras, most=lora.max_cpu_loras, accept_base=options.accept_base)
        if rank == 0 and self._config.parallel_config.data_parallel_index == 0:
            self._tenants.counts.file = counts_file(self._config.instance_id)
            remove_at_exit(self._tenants.counts.file)
        serve(model, step, table)
        logger.info(
            "deltaweave: %.2f GiB for tenants on rank %d of %d, %d in a step, %d in host memory",
            size / 2**30,
            rank,
            ranks,
            lora.max_loras,
            lora.max_cpu_loras,
        )
        return model

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        """A step begins: `mapping` has the adapter id of every token and of every row that is sampled."""
        adapters = {request.lora_int_id: _adapter(request) for request in requests}
        self._tenants.begin(mapping.index_mapping, mapping.prompt_mapping, adapters)
        if self._warming:  # the run that measures memory has no adapters, and shall see what tenants need
            whole = len(mapping.index_mapping) >= self._tokens
            fused = whole or self._tenants.step.rehearses_fusions
            self._tenants.warm(active=whole or any(mapping.index_mapping), fused=fused)

    def add_adapter(self, request: Any) -> bool:
        """Loads a tenant, between two steps."""
        _require_loadable(request)
        if self._tenants.add(_adapter(request)):
            _log_loaded(request)
        return True

    def begin_to_add(self, request: Any) -> Future[bool]:
        """Loads a tenant beside the steps; what is wrong with it, the result raises."""
        _require_loadable(request)
        self._tenants.admit_finished()
        reading, loaded = self._tenants.read_ahead(_adapter(request)), Future[bool]()

        def finish(read: Future[Any]) -> None:
            if error := read.exception():
                loaded.set_exception(error)
                return
            _log_loaded(request)
            loaded.set_result(True)

        if reading is None:
            loaded.set_result(True)
        else:
            reading.add_done_callback(finish)
        return loaded

    def await_tenant(self, request: Any) -> None:
        """Returns when a request's tenant is at hand; may be called by any thread.

        Raises:
            DeltaweaveError: it cannot be had, a file that is gone included.
        """
        reading = self._tenants.read_ahead(_adapter(request))
        if reading is not None:
            reading.result()

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets a tenant."""
        return self._tenants.remove(adapter_id)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Is not there: a tenant comes back from host memory in milliseconds."""
        raise OptionError(f"adapter {adapter_id}: tenants cannot be pinned in vLLM")

    def list_adapters(self) -> set[int]:
        """Ids of what is in host memory."""
        return self._tenants.ids

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Warm-up, captures and the run that measures memory."""
        self._warming = True
        try:
            yield
        finally:
            self._warming = False
            self._tenants.warm(active=False, fused=False)

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """A stand-in for warm-up."""
        self._tenants.stand_in(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Is of no interest: a stand-in has no weights."""
        return default_rank

    def remove_all_adapters(self) -> None:
        """Warm-up is over; vLLM calls it at no other time."""
        self._tenants.clear_stand_ins()

    def supports_tower_connector_lora(self) -> bool:
        """No: models of text alone."""
        return False


def _adapter(request: Any) -> Adapter:
    return Adapter(request.lora_int_id, request.lora_name, request.lora_path)


def _require_loadable(request: Any) -> None:
    if request.load_inplace:
        raise OptionError(f"{request.lora_name}: load_inplace is not supported: unload it and load it again")
    if not Path(request.lora_path).exists():
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)


def _log_loaded(request: Any) -> None:
    logger.info("deltaweave: loaded %s from %s", request.lora_name, request.lora_path)


def _require_supported(config: Any) -> None:
    parallel, model = config.parallel_config, config.model_config
    for found, what in (
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size above 1"),
        (getattr(parallel, "use_ubatching", False), "--enable-dbo"),
        (getattr(model, "enable_prompt_embeds", False), "--enable-prompt-embeds"),
        (config.lora_config.fully_sharded_loras, "--fully-sharded-loras"),
    ):
        if found:
            raise OptionError(f"{what} is not supported with --quantization deltaweave")


def _base_files(config: Any) -> BaseFiles:
    """Of the checkpoint: as it was named, or where the hub's files were put."""
    model = config.model_config
    if os.path.isdir(model.model):  # noqa: PTH112  # a name of the hub is no path
        return BaseFiles(Path(model.model))
    try:
        folder = snapshot_download(
            model.model, revision=model.revision, cache_dir=config.load_config.download_dir, local_files_only=True
        )
        # vLLM puts weights alone into --download-dir.
        return BaseFiles(Path(folder), AutoConfig.from_pretrained(model.model, revision=model.revision))
    except Exception as error:  # whatever the hub's client raises
        raise DeltaweaveError(f"{model.model}: the base's files are not at hand ({error})") from error
