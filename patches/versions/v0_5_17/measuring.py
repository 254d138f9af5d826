"""Statistics of the model that an engine of SGLang 0.5.17 has loaded, before it serves."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches.versions.v0_5_17.loading import attention
from sglang_tri.patches.versions.v0_5_17.rotary import find_rotary
from sglang_tri.patches.versions.v0_5_17.scheduling import attach_state
from sglang_tri.statistics.moments import Moments

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_tri.statistics.calibration_text import Tokenizer
    from sglang_tri.statistics.rope import Rope

model_path = attrgetter("server_args.model_path")
# Attention layers of the model.
layers = attrgetter("tp_worker.model_runner.model_config.num_hidden_layers")


def weights(scheduler: Scheduler) -> Iterable[tuple[str, torch.Tensor]]:
    """Names and tensors of the model."""
    return scheduler.tp_worker.model_runner.model.state_dict().items()


def tokenizer(scheduler: Scheduler) -> Tokenizer:
    """The model's tokenizer, also with --skip-tokenizer-init.

    Raises:
        KvPolicyError: it cannot be loaded.
    """
    if scheduler.tokenizer is not None:
        return scheduler.tokenizer
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    args = scheduler.server_args
    try:
        return get_tokenizer(
            args.tokenizer_path,
            tokenizer_mode=args.tokenizer_mode,
            trust_remote_code=args.trust_remote_code,
            tokenizer_revision=args.revision,
        )
    except (OSError, ValueError) as error:
        raise KvPolicyError(
            f"--kv-stats auto: {args.tokenizer_path} needs its tokenizer to read text ({error}). "
            "Give --tokenizer-path, or --kv-stats FILE."
        ) from error


def longest_prefill(scheduler: Scheduler) -> int:
    """Tokens that one prefill takes here, and that leave half of the pool free."""
    args, runner = scheduler.server_args, scheduler.tp_worker.model_runner
    chunk = args.chunked_prefill_size or 0
    return min(
        chunk if chunk > 0 else args.max_prefill_tokens,
        runner.model_config.context_len,
        scheduler.max_total_num_tokens // 2,
    )


def describe_model(scheduler: Scheduler) -> dict[str, Any]:
    """What tells one model from another, beside its weights and RoPE; plain values."""
    runner = scheduler.tp_worker.model_runner
    config = runner.model_config
    return {
        "architectures": list(config.hf_config.architectures),
        "head_dim": config.head_dim,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "dtype": str(config.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(runner.kv_cache_dtype).removeprefix("torch."),
        "quantization": config.quantization,
    }


def moments(scheduler: Scheduler, rope: Rope) -> Moments:
    """Empty sums for the heads of the model."""
    model = scheduler.tp_worker.model_runner.model
    first, *_ = attention_layers(model, layers(scheduler))
    heads, module = (first.tp_q_head_num, first.tp_k_head_num), find_rotary(model)
    # Read at each use: the engine may replace the table at its first.
    return Moments(layers(scheduler), *heads, rope, lambda: module.cos_sin_cache)


@contextmanager
def measuring(
    scheduler: Scheduler, moments: Moments, progress: Callable[[int], object]
) -> Iterator[None]:
    """Inside, `moments` counts every token of a prefill; the pool is empty afterwards.

    Args:
        progress: called with the number of tokens, after each layer.
    """
    runner = scheduler.tp_worker.model_runner
    seen = attention_layers(runner.model, layers(scheduler))
    try:
        with (
            torch.no_grad(),
            every_core(),
            eager_prefill(runner),
            captured(seen, moments, progress),
        ):
            yield
    finally:
        _empty_pool(scheduler)


def attention_layers(model: torch.nn.Module, layers: int) -> list[RadixAttention]:
    """The attention layers of `model`, one for each layer of its KV cache.

    Raises:
        KvPolicyError: layers are missing, doubled, or differ in their heads.
    """
    found = list(attention(model))
    heads = {(m.tp_q_head_num, m.tp_k_head_num, m.head_dim) for m in found}
    if sorted(m.layer_id for m in found) != list(range(layers)) or len(heads) != 1:
        raise KvPolicyError(
            f"--kv-stats auto cannot measure {type(model).__name__}: it has {len(found)} attention "
            f"layers of {len(heads)} geometries for {layers} layers of KV cache. "
            "Give --kv-stats FILE."
        )
    return found


@contextmanager
def captured(
    layers: list[RadixAttention], moments: Moments, progress: Callable[[int], object]
) -> Iterator[None]:
    """Inside, `moments` counts every token that passes through `layers`.

    Args:
        progress: called with the number of tokens, after each layer.
    """
    signature = inspect.signature(type(layers[0]).forward)

    def see(layer: RadixAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind(layer, *args, **kwargs).arguments
        if call["k"] is None:
            raise KvPolicyError(
                f"--kv-stats auto cannot measure layer {layer.layer_id}: its attention is given no "
                "keys. Give --kv-stats FILE."
            )
        positions = call["forward_batch"].positions
        moments.add(layer.layer_id, call["q"], call["k"], positions)
        progress(len(positions))

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eager_prefill(runner: ModelRunner) -> Iterator[None]:
    """Inside, prefill calls the model's modules instead of replaying graphs."""
    graphs, runner.prefill_cuda_graph_runner = runner.prefill_cuda_graph_runner, None
    try:
        yield
    finally:
        runner.prefill_cuda_graph_runner = graphs


def every_core() -> AbstractContextManager[None]:
    """Inside, a model on a CPU takes all cores, also those that are others' while it serves."""
    from sglang.srt.platforms import current_platform

    from sglang_tri.patches.cpu.platform import TorchCpuPlatform

    if isinstance(current_platform, TorchCpuPlatform):
        return current_platform.every_core()
    return nullcontext()


def prefill(scheduler: Scheduler, ids: Sequence[int]) -> None:
    """Let the engine compute the KV of `ids`; leave nothing of it in its slots."""
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.common import release_kv_cache
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner = scheduler.tp_worker.model_runner
    req = Req("calibration", "", array("q", ids), SamplingParams(max_new_tokens=1))
    attach_state(req, None)
    req.init_next_round_input(scheduler.tree_cache)
    req.set_extend_range(0, len(ids))
    batch = ScheduleBatch.init_new(
        [req],
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        runner.model_config,
        enable_overlap=False,
        spec_algorithm=scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
    runner.forward(ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False))
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[batch.out_cache_loc] = 0
    row = req.req_pool_idx
    release_kv_cache(req, scheduler.tree_cache, is_insert=False)
    scheduler.req_to_token_pool.req_to_token[row] = 0


def _empty_pool(scheduler: Scheduler) -> None:
    """Slots, rows, tree and the device's memory as they were when the engine was loaded."""
    from sglang.srt.platforms import current_platform

    scheduler.tree_cache.reset()
    scheduler.req_to_token_pool.clear()
    scheduler.token_to_kv_pool_allocator.clear()
    current_platform.empty_cache()
