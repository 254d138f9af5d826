"""The scheduler process: install the hooks, check the loaded engine, build the runtime."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sglang_tri import warmup
from sglang_tri.aliases import AliasStore
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.execution import Cache
from sglang_tri.patches import (
    active,
    calibration,
    flags,
    hooks,
    launch,
    memory,
    request_settings,
    rope,
    thinking,
)
from sglang_tri.patches import sglang_0517 as adapter
from sglang_tri.runtime import Observer, Runtime
from sglang_tri.statistics import Statistics
from sglang_tri.statistics.virtual_queries import virtual_queries
from sglang_tri.trace import TraceWriter

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

logger = logging.getLogger(__name__)

# Folder for files that record every round (see sglang_tri.trace).
TRACE = "SGLANG_KV_POLICY_TRACE"
# "1": they also hold the rows of K and V before and after it.
TRACE_ROWS = "SGLANG_KV_POLICY_TRACE_ROWS"


def start_scheduler(
    original: Callable[..., None], scheduler: Scheduler, *args: Any, **kwargs: Any
) -> None:
    """AROUND Scheduler.__init__: without a policy no other hook is ever installed."""
    from sglang_tri.patches import table  # It names this module.

    server_args = kwargs["server_args"] if "server_args" in kwargs else args[0]
    settings = flags.attached(server_args)
    if settings is None:
        original(scheduler, *args, **kwargs)
        return
    hooks.install(table.stage(table.SCHEDULER))
    original(scheduler, *args, **kwargs)
    if scheduler.tree_cache.disable:
        settings = replace(settings, reuse="prompt")  # There is nothing to find anything in.
    runtime = _build_runtime(scheduler, settings)
    found = active.Active(
        runtime, scheduler, AliasStore(settings.alias_limit), thinking.end_ids(scheduler)
    )
    active.activate(found)
    statistics = _read_statistics(scheduler, settings, runtime)
    found.statistics = (statistics.path or None) if statistics is not None else None
    runtime.check_runnable(settings)
    warmup.run(runtime, warmup.all_settings(settings, request_settings.allowed()))
    logger.info(
        "KV policy: %s, mode %s, budget %d, interval %d, reuse %s, statistics %s",
        settings.policy,
        settings.eviction_mode,
        settings.budget,
        settings.interval,
        settings.reuse,
        "none" if statistics is None else statistics.path or "not kept",
    )


def _build_runtime(scheduler: Scheduler, settings: KvPolicyConfig) -> Runtime:
    _check_tree(scheduler)
    _check_windows(scheduler.tp_worker.model_runner.model)
    cache = _read_pool(scheduler)
    rows = scheduler.req_to_token_pool.req_to_token.shape[0]
    return Runtime(
        settings,
        cache,
        rows,
        scheduler.page_size,
        workspace=memory.reserved(),
        observer=_observer(cache),
    )


def _observer(cache: Cache) -> Observer | None:
    folder = os.environ.get(TRACE)
    if not folder:
        return None
    return TraceWriter(folder, cache.rows if os.environ.get(TRACE_ROWS) == "1" else ())


def _read_statistics(
    scheduler: Scheduler, settings: KvPolicyConfig, runtime: Runtime
) -> Statistics | None:
    """Give `runtime` its virtual queries, from a file or measured now."""
    statistics = launch.read_statistics(settings)
    if statistics is None and not settings.calibrates:
        return None
    module = rope.find_rotary(scheduler.tp_worker.model_runner.model)
    spec = rope.read_rope(module)
    if statistics is None:
        statistics = calibration.automatic(scheduler, settings, module, spec)
    keys = runtime.cache.keys
    kv_heads, head_dim = keys.heads, keys.head_dim
    group = statistics.shape[1] // kv_heads
    with launch.naming_statistics():
        statistics.check_rope(spec)
        statistics.check_geometry(len(keys), kv_heads * group, head_dim)
    runtime.queries = virtual_queries(statistics, spec, runtime.cache.device)
    return statistics


def _check_tree(scheduler: Scheduler) -> None:
    kind = type(scheduler.tree_cache)
    if kind not in adapter.prefix_caches():
        raise KvPolicyError(
            f"--kv-policy does not know the prefix cache {kind.__name__}: "
            "use SGLang's default one, or --disable-radix-cache."
        )


def _check_windows(model: torch.nn.Module) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    for module in model.modules():
        if isinstance(module, RadixAttention) and module.sliding_window_size > 0:
            raise KvPolicyError(
                f"--kv-policy does not work with a sliding window of {module.sliding_window_size} "
                f"tokens (layer {module.layer_id}): attention kernels count slots of the window, "
                "not positions. Serve another model, or leave --kv-policy out."
            )


def _read_pool(scheduler: Scheduler) -> Cache:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if type(pool) is not MHATokenToKVPool or pool.kv_cache_layout != "nhd":
        raise KvPolicyError(
            f"--kv-policy does not know the KV pool {type(pool).__name__} "
            f"({getattr(pool, 'kv_cache_layout', 'other')} layout): it needs SGLang's "
            "MHATokenToKVPool in NHD layout."
        )
    scale = _key_scale(scheduler.tp_worker.model_runner.model, pool)
    return Cache.of(pool.k_buffer, pool.v_buffer, scheduler.page_size, pool.dtype, scale)


def _key_scale(model: torch.nn.Module, pool: MHATokenToKVPool) -> torch.Tensor | None:
    """What stored keys are to be multiplied by, where the checkpoint says so for an fp8 cache."""
    from sglang.srt.layers.radix_attention import RadixAttention

    scales = torch.ones(len(pool.k_buffer))
    for module in model.modules():
        if isinstance(module, RadixAttention) and module.k_scale_float is not None:
            scales[module.layer_id] = module.k_scale_float
    if pool.dtype == pool.store_dtype or bool((scales == 1).all()):
        return None
    return scales.to(pool.k_buffer[0].device)
