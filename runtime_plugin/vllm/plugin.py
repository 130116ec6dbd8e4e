# SPDX-License-Identifier: Apache-2.0
"""All that is done to vLLM, in one place.

Through its own extension points: a quantization method, whose name switches this host on, and a resolver for folders of
tenants. Some of its functions have no such point and are wrapped here, for the version that `require_version` checks:

    LRUCacheWorkerLoRAManager   what a model runner makes to hold adapters; ours is made where the method is deltaweave
    _gen_lora_extra_hash_keys   a prefix cache's key for a request: an adapter's id is added to its name, because a name
                                may be unloaded and loaded again with another file
    EngineCoreProc              where the worker lives in the engine's process: `add_lora` gives a future, for which
                                vLLM answers when it is there, and `preprocess_add_request`, which vLLM calls in the
                                thread that receives requests, lets a request wait for its tenant's file; steps go on
                                meanwhile, and if the file is gone, that request alone fails
    CudagraphDispatcher         captures a graph more of every size, with fusions' kernels, and picks it for a step that
                                has a fusion; for vLLM it is the graph of two adapters more than a step may have (one
                                more is its own number for any)
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from deltaweave.runtime_plugin.vllm.options import Options
from deltaweave.runtime_plugin.vllm.quantization import NAME, DeltaweaveConfig
from deltaweave.runtime_plugin.vllm.resolver import register_folder
from deltaweave.runtime_plugin.vllm.step import Step
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.v1.core import kv_cache_utils

__all__ = ["install"]

installed = False


def install() -> None:
    """Registers and wraps, once a process."""
    global installed
    if installed:
        return
    installed = True
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(DeltaweaveConfig)
    register_folder()
    _wrap_prefix_keys()
    _wrap_manager()
    _wrap_engine()
    _wrap_graphs()


def _wrap_prefix_keys() -> None:
    names = kv_cache_utils._gen_lora_extra_hash_keys

    def keys(request: Any) -> list[str]:
        found: list[str] = names(request)
        return [f"{name}#{request.lora_request.lora_int_id}" for name in found]

    kv_cache_utils._gen_lora_extra_hash_keys = keys


def _wrap_manager() -> None:
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    stock = mixin.LRUCacheWorkerLoRAManager

    def manager(vllm_config: Any, device: Any, embedding_modules: Any) -> Any:
        if vllm_config.model_config.quantization != NAME:
            return stock(vllm_config, device, embedding_modules)
        from deltaweave.runtime_plugin.vllm.manager import TenantManager

        return TenantManager(vllm_config, device)

    mixin.LRUCacheWorkerLoRAManager = manager


def _wrap_engine() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    stock_add, stock_preprocess = EngineCoreProc.add_lora, EngineCoreProc.preprocess_add_request

    @wraps(stock_add)  # vLLM reads the signature
    def add(engine: Any, lora_request: Any) -> Any:
        manager = _manager_beside(engine)
        return stock_add(engine, lora_request) if manager is None else manager.begin_to_add(lora_request)

    @wraps(stock_preprocess)
    def preprocess(engine: Any, request: Any) -> Any:
        manager = None if request.lora_request is None else _manager_beside(engine)
        if manager is not None:
            manager.await_tenant(request.lora_request)
        return stock_preprocess(engine, request)

    EngineCoreProc.add_lora, EngineCoreProc.preprocess_add_request = add, preprocess


def _wrap_graphs() -> None:
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    stock_cases, stock_dispatch = CudagraphDispatcher._get_lora_cases, CudagraphDispatcher.dispatch

    def fused_case(config: Any) -> int | None:
        serves = config.model_config.quantization == NAME and config.lora_config is not None
        return config.lora_config.max_loras + 2 if serves else None

    @wraps(stock_cases)
    def cases(dispatcher: Any) -> list[int]:
        found: list[int] = stock_cases(dispatcher)
        case = fused_case(dispatcher.vllm_config)
        if case is None or not Options.read(dispatcher.vllm_config.additional_config).fusions:
            return found
        dispatcher.specialize_lora_count = True  # it looks for the least case that is no less than a step's number
        return [*found, case]

    @wraps(stock_dispatch)
    def dispatch(dispatcher: Any, *arguments: Any, num_active_loras: int = 0, **more: Any) -> Any:
        case = fused_case(dispatcher.vllm_config)
        if case is not None:
            num_active_loras = Step.current.graph_case(num_active_loras, case)
        return stock_dispatch(dispatcher, *arguments, num_active_loras=num_active_loras, **more)

    CudagraphDispatcher._get_lora_cases, CudagraphDispatcher.dispatch = cases, dispatch


def _manager_beside(engine: Any) -> Any:
    """The manager of tenants, if there is one in the engine's own process."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if engine.vllm_config.model_config.quantization != NAME or type(engine.model_executor) is not UniProcExecutor:
        return None
    return engine.model_executor.driver_worker.model_runner.lora_manager
