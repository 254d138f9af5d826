"""What is particular to SGLang 0.5.17: where it keeps what the hooks read and write.

With the targets in `table`, this is what another version changes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_tri.rounds import RequestState
from sglang_tri.spans import Chain

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
    from sglang.srt.server_args import ServerArgs

TESTED_VERSIONS = ("0.5.17",)

_STATE = "kv_policy_state"
# Attention backends that have read the slot table before a decode graph is replayed.
_READ_BEFORE_GRAPHS = ("fa3", "fa4", "flashinfer", "triton")


def prefix_caches() -> tuple[type, ...]:
    """The classes of SGLang's default prefix cache, on and off."""
    from sglang.srt.mem_cache.chunk_cache import ChunkCache
    from sglang.srt.mem_cache.radix_cache import RadixCache

    return RadixCache, ChunkCache


def attention_backends(server_args: ServerArgs) -> tuple[str, str]:
    """The names of those that prefill and decode run with."""
    prefill, decode = server_args.get_attention_backends()
    return prefill, decode


def waits_for_reads(scheduler: Scheduler) -> bool:
    """Whether SGLang orders its stream behind a forward pass's reads of the slot table.

    After each launch it waits until a decode graph is about to be replayed, and where there is
    none for the whole pass; not on GPUs of AMD. What is read inside a graph comes later.
    """
    decode = attention_backends(scheduler.server_args)[1]
    return scheduler._war_barrier_enabled and decode in _READ_BEFORE_GRAPHS


def attach_state(req: Req, state: RequestState | None) -> None:
    setattr(req, _STATE, state)


def has_state(req: Req) -> bool:
    return _STATE in vars(req)


def state_of(req: Req) -> RequestState | None:
    """The policy's state of a request that has been queued; None where its policy is `none`."""
    state: RequestState | None = vars(req)[_STATE]
    return state


def physical_length(req: Req) -> int:
    """Slots in use by a running request."""
    return req.kv_committed_len


def set_physical_length(req: Req, length: int) -> None:
    req.kv_committed_len = length
    req.kv.kv_allocated_len = length


def tokens(req: Req) -> array[int]:
    """Prompt and output."""
    return req.origin_input_ids + req.output_ids


def token_outside_vocabulary(req: Req) -> int | None:
    """Position of the first prompt token that the model has no embedding for."""
    ids = np.frombuffer(req.origin_input_ids, dtype=np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= req.vocab_size))
    return int(outside[0]) if outside.size else None


def tokens_tell_all(req: Req) -> bool:
    """Whether equal tokens mean equal KV."""
    return (
        req.input_embeds is None
        and req.positional_embed_overrides is None
        and req.multimodal_inputs is None
    )


def wants_prompt_logprobs(req: Req) -> bool:
    return req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)


def physical_key(key: RadixKey, chain: Chain, most: int | None) -> RadixKey:
    """The key that the tree knows the first `most` tokens of `key` by, or all but the last.

    SGLang computes the last token in any case. It may have limited `key` to a request's prompt, to
    compute log-probabilities of a retracted output again that have been sent already.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    if most is None:
        ids = chain.physical_ids(key.token_ids)
        return RadixKey(ids, key.extra_key, limit=len(ids) - 1)
    return RadixKey(chain.physical_ids(key.token_ids[:most]), key.extra_key)


def shortened_key(key: RadixKey, most: int) -> RadixKey:
    """The first `most` tokens of `key`."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(key.token_ids, key.extra_key, limit=min(len(key), most))


def prefilled_length(req: Req) -> int:
    """Slots in use behind the prefill that is being prepared."""
    return req.extend_range.end


def continue_private(req: Req, slots: torch.Tensor, delta: int) -> None:
    """Prefill the rest of a request's tokens behind `slots`, which hold `delta` tokens more."""
    physical = len(slots)
    rest = tokens(req)[physical + delta :]
    req.prefix_indices = slots
    # Only what lies behind the prefix is read of these ids.
    req.full_untruncated_fill_ids = array("q", bytes(8 * physical)) + rest
    req.set_extend_range(physical, physical + len(rest))


def keep_private(req: Req, rows: torch.Tensor) -> None:
    """The chunk that was prefilled belongs to the request alone."""
    req.prefix_indices = rows[req.req_pool_idx, : req.extend_range.end].long()


def take_back(tree: RadixCache, req: Req, start: int) -> bool:
    """Make the slots of `req` from `start` on its own again, which it has found in the tree.

    Returns:
        False where other requests have come to share them.
    """
    path, first = [], len(req.prefix_indices)
    node = req.last_node
    while first > start:
        first -= len(node.key)
        path.append(node)
        node = node.parent
    rest = list(path[0].children.values())
    alone = all(set(above.children.values()) == {below} for below, above in pairwise(path))
    in_use = any(n.lock_ref > 1 for n in path) or any(n.children or n.lock_ref for n in rest)
    if in_use or not alone:
        return False
    tree.dec_lock_ref(req.last_node)
    for leaf in rest:
        tree.token_to_kv_pool_allocator.free_segment(leaf.value, start_pos=0)
        tree._delete_leaf(leaf)
    if first < start:
        tree._split_node(path[-1].key, path[-1], start - first)
    req.last_node = path[-1].parent
    for node in path:
        tree._delete_leaf(node)
    tree.inc_lock_ref(req.last_node)
    req.cache_protected_len = start
    return True


def remaining_prefill(req: Req) -> int:
    """Tokens that are still to be prefilled."""
    return len(req.full_untruncated_fill_ids) - len(req.prefix_indices)


def fits_whole(adder: PrefillAdder, req: Req, most: int) -> bool:
    """Whether the rest of a request is prefilled at once, without help, in at most `most` tokens.

    With chunked prefill off, SGLang has no limit to compare a last chunk with.
    """
    begun = req.req_pool_idx is not None
    return remaining_prefill(req) <= most and not (begun and adder.rem_chunk_tokens is None)


def has_chunk(scheduler: Scheduler, adder: PrefillAdder, req: Req) -> bool:
    """Whether another request is prefilled in chunks: SGLang takes one at a time."""
    return adder.new_chunked_req is not None or scheduler.chunked_req not in (None, req)


def try_later() -> Any:
    """What tells SGLang that a waiting request cannot be taken into this batch."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.OTHER


@contextmanager
def chunk_of(adder: PrefillAdder, most: int) -> Iterator[None]:
    """Inside, at most `most` tokens are prefilled, and no more with them."""
    before = adder.rem_chunk_tokens
    adder.rem_chunk_tokens = most if before is None else min(before, most)
    try:
        yield
    finally:
        # Nobody else may be cut off in this batch, so nobody comes along who might be.
        adder.rem_chunk_tokens = None if before is None else 0


def use_physical_ids(req: Req, chain: Chain) -> None:
    """Let a prefill count slots: SGLang takes what it computes from these ids and their number."""
    req.full_untruncated_fill_ids = chain.physical_ids(tokens(req))


def forget_physical_ids(req: Req) -> None:
    """SGLang extends these ids in place where their number fits: make it build them anew."""
    req.full_untruncated_fill_ids = array("q")


@contextmanager
def _divided(req: Req, prompt: array[int], output: array[int]) -> Iterator[None]:
    """Inside, the request's tokens are these."""
    before = req.origin_input_ids, req.output_ids
    req.origin_input_ids, req.output_ids = prompt, output
    try:
        yield
    finally:
        req.origin_input_ids, req.output_ids = before


def physical_tokens(req: Req, chain: Chain) -> AbstractContextManager[None]:
    """Inside, the request's tokens are the ids that the prefix cache knows them by."""
    ids = chain.physical_ids(tokens(req))
    prompt = chain.physical_length(len(req.origin_input_ids))
    return _divided(req, ids[:prompt], ids[prompt:])


def prompt_in_tree(req: Req) -> AbstractContextManager[None]:
    """Inside, all that the prefix cache holds of a request counts as its prompt.

    With --strip-thinking-cache SGLang frees what lies behind the prompt of a reasoning request.
    Of one that was retracted, the prefix cache can hold more: that is not the request's to free.
    """
    prompt, output = req.origin_input_ids, req.output_ids
    more = req.cache_protected_len - len(prompt)
    if more <= 0:
        return nullcontext()
    return _divided(req, prompt + output[:more], output[more:])


def count_cached(req: Req, tokens: int) -> None:
    """Count `tokens` more as found in the prefix cache, once in a request's life as SGLang does."""
    if not req.retracted_stain:
        req.cached_tokens += tokens
        req.cached_tokens_device += tokens


def shrink_batch(batch: ScheduleBatch, cut: torch.Tensor) -> None:
    """Subtract `cut`, int64 [requests] on the CPU, from the batch's physical lengths."""
    # New tensors: the previous step's forward pass may still read the old ones.
    batch.seq_lens_cpu = batch.seq_lens_cpu - cut
    batch.seq_lens = batch.seq_lens - cut.to(batch.seq_lens.device, non_blocking=True)
    batch.seq_lens_sum = None


def custom_params(req: Req) -> object:
    """What a request brings beside SGLang's own sampling parameters."""
    return req.sampling_params.custom_params


def longest_output(scheduler: Scheduler, req: Req, asked: int | None) -> int:
    """`max_new_tokens` as far as the context length and the server's own limit allow."""
    context = scheduler.model_config.context_len - len(req.origin_input_ids) - 2
    limit = scheduler.max_new_tokens_limit or context
    return max(0, min(context if asked is None else asked, context, limit))


def remaining_output(req: Req) -> int:
    return max(0, req.sampling_params.max_new_tokens - len(req.output_ids))


def clip_estimate(slots: int) -> int:
    """SGLang's own upper bound of what it expects a request to write."""
    from sglang.srt.managers import schedule_policy

    return min(slots, schedule_policy.CLIP_MAX_NEW_TOKENS)


@contextmanager
def expecting(req: Req, slots: int) -> Iterator[None]:
    """Inside, SGLang expects `req` to take at most `slots` for its output."""
    from sglang.srt.managers import schedule_policy

    clip, ignores_eos = schedule_policy.CLIP_MAX_NEW_TOKENS, req.sampling_params.ignore_eos
    schedule_policy.CLIP_MAX_NEW_TOKENS = clip_estimate(slots)
    # Without a radix cache SGLang has a way of its own for these, by their whole outputs.
    req.sampling_params.ignore_eos = False
    try:
        yield
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = clip
        req.sampling_params.ignore_eos = ignores_eos


def publish_at_end(req: Req, key: str, value: dict[str, Any]) -> None:
    """Send `value` with the request's last token; it reaches the tokenizer manager by `key`."""
    # SGLang aligns these lists with the output tokens.
    padding = [None] * (len(req.output_ids_through_stop) - 1)
    if req.output_ids_through_stop:
        req.customized_info = {**(req.customized_info or {}), key: [*padding, value]}
