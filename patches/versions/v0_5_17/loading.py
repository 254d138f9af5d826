"""The engine of SGLang 0.5.17 when it is loaded: what the policy needs, and cannot run with."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches.versions.v0_5_17 import rotary
from sglang_tri.round.run import KvCache
from sglang_tri.statistics.rope import Rope

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.memory_pool import KVCache, MHATokenToKVPool
    from sglang.srt.model_executor.model_runner import ModelRunner

# What chat templates end thinking with; a reasoning parser knows better.
_THINK_MARKS = ("</think>", "[/THINK]", "◁/think▷")


def check(scheduler: Scheduler) -> None:
    """Raise `KvPolicyError` for a tree, a model or a KV pool that the policy cannot run with."""
    _check_tree(scheduler.tree_cache)
    _check_windows(scheduler.tp_worker.model_runner.model)
    _check_pool(scheduler.token_to_kv_pool_allocator.get_kvcache())


def _check_tree(tree: BasePrefixCache) -> None:
    from sglang.srt.mem_cache.chunk_cache import ChunkCache
    from sglang.srt.mem_cache.radix_cache import RadixCache

    if type(tree) not in (RadixCache, ChunkCache):
        raise KvPolicyError(
            f"--kv-policy does not know the prefix cache {type(tree).__name__}: "
            "use SGLang's default one, or --disable-radix-cache."
        )


def _check_windows(model: torch.nn.Module) -> None:
    for layer in attention(model):
        if layer.sliding_window_size > 0:
            raise KvPolicyError(
                f"--kv-policy does not work with a sliding window of {layer.sliding_window_size} "
                f"tokens (layer {layer.layer_id}): attention kernels count slots of the window, "
                "not positions. Serve another model, or leave --kv-policy out."
            )


def _check_pool(pool: KVCache) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if type(pool) is not MHATokenToKVPool or pool.kv_cache_layout != "nhd":
        raise KvPolicyError(
            f"--kv-policy does not know the KV pool {type(pool).__name__} "
            f"({getattr(pool, 'kv_cache_layout', 'other')} layout): it needs SGLang's "
            "MHATokenToKVPool in NHD layout."
        )


def has_prefix_cache(scheduler: Scheduler) -> bool:
    return not scheduler.tree_cache.disable


def device(runner: ModelRunner) -> torch.device:
    return torch.device(runner.device)


def kv_cache(scheduler: Scheduler) -> KvCache:
    """The KV pool."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    model, keys, values = scheduler.tp_worker.model_runner.model, pool.k_buffer, pool.v_buffer
    scales = (_scale(model, pool, name) for name in ("k_scale_float", "v_scale_float"))
    return KvCache.of(keys, values, scheduler.page_size, pool.dtype, *scales)


def _scale(model: torch.nn.Module, pool: MHATokenToKVPool, name: str) -> torch.Tensor | None:
    """What stored rows are to be multiplied by, where the checkpoint says so for an fp8 cache."""
    scales = torch.ones(len(pool.k_buffer))
    for layer in attention(model):
        if getattr(layer, name) is not None:
            scales[layer.layer_id] = getattr(layer, name)
    if pool.dtype == pool.store_dtype or bool((scales == 1).all()):
        return None
    return scales.to(pool.k_buffer[0].device)


def attention(model: torch.nn.Module) -> Iterator[RadixAttention]:
    """The attention layers of a model."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return (module for module in model.modules() if isinstance(module, RadixAttention))


def think_mark(scheduler: Scheduler) -> array[int]:
    """Token ids that end this model's thinking, by its reasoning parser or its chat template."""
    ids = scheduler.model_config.think_end_ids
    if not ids and scheduler.tokenizer is not None:
        template = _template(scheduler)
        mark = next((mark for mark in _THINK_MARKS if mark in template), "")
        ids = scheduler.tokenizer.encode(mark, add_special_tokens=False)
    return array("q", ids or ())


def _template(scheduler: Scheduler) -> str:
    given = scheduler.server_args.chat_template
    if given and Path(given).is_file():
        return Path(given).read_text()
    template = scheduler.tokenizer.chat_template
    return template if isinstance(template, str) else ""


def rope(scheduler: Scheduler) -> Rope:
    """What the model's rotary embedding does to each head; see `rotary` for what is refused."""
    return rotary.read_rope(rotary.find_rotary(scheduler.tp_worker.model_runner.model))
