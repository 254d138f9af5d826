"""Requests, batches and the radix tree of SGLang 0.5.17 while it serves."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

import torch

from sglang_tri.history import Chain
from sglang_tri.request.request import Request

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import (
        MatchPrefixParams,
        MatchResult,
    )
    from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

_STATE = "kv_policy_state"
# Attention backends that have read the slot table before a decode graph is replayed.
_READ_BEFORE_GRAPHS = ("fa3", "fa4", "flashinfer", "triton")


# Where SGLang keeps what the hooks read.
state_of = attrgetter(_STATE)  # of one that was queued; None where its policy is `none`
identity = attrgetter("rid", "origin_input_ids", "extra_key")  # the last keeps prefixes apart
vocabulary = attrgetter("vocab_size")  # ids that the model has embeddings for
custom_params = attrgetter("sampling_params.custom_params")  # beside SGLang's own parameters
output_limits = attrgetter("sampling_params.max_new_tokens", "sampling_params.min_new_tokens")
output = attrgetter("output_ids")
is_refused = attrgetter("to_finish")  # None unless it ends before it is served
is_finished = methodcaller("finished")
row = attrgetter("req_pool_idx")  # of the slot table, while it has slots
physical_length = attrgetter("kv_committed_len")  # slots in use by a running request
prefilled_length = attrgetter("extend_range.end")  # the same behind a prefill
pool_size = attrgetter("max_total_num_tokens")  # slots of the KV pool
slot_table = attrgetter("req_to_token_pool.req_to_token")  # int32 [rows, length]
tree = attrgetter("tree_cache")
requests = attrgetter("reqs")
preempted = attrgetter("preempt_list")  # whom it has taken out of the running batch
matching = attrgetter("req")  # whose prefix is looked up


def attach_state(req: Req, request: Request | None) -> None:
    setattr(req, _STATE, request)


def has_state(req: Req) -> bool:
    return _STATE in vars(req)


def tokens(req: Req) -> array[int]:
    return req.origin_input_ids + req.output_ids


def kv_depends_only_on_tokens(req: Req) -> bool:
    """Whether equal tokens mean equal KV."""
    return (
        req.input_embeds is None
        and req.positional_embed_overrides is None
        and req.multimodal_inputs is None
    )


def wants_prompt_logprobs(req: Req) -> bool:
    return req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids)


def refuse(req: Req, reason: str) -> None:
    """End it with a 400 before it is served; SGLang logs the reason with its id."""
    req.set_finish_with_abort(reason)


def has_slots(req: Req) -> bool:
    return req.req_pool_idx is not None


def set_physical_length(req: Req, length: int) -> None:
    req.kv_committed_len = length
    req.kv.kv_allocated_len = length


def physical_params(params: MatchPrefixParams, chain: Chain, most: int | None) -> MatchPrefixParams:
    """Look for what the tree knows the first `most` tokens by, or all but the last.

    SGLang computes the last token in any case. It may have limited the key to a request's prompt,
    to compute log-probabilities of a retracted output again that have been sent already.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = params.key
    ids = chain.physical_ids(key.token_ids if most is None else key.token_ids[:most])
    limit = len(ids) - 1 if most is None else None
    return replace(params, key=RadixKey(ids, key.extra_key, limit=limit))


def shortened_params(params: MatchPrefixParams, most: int) -> MatchPrefixParams:
    """Look for the first `most` tokens."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = params.key
    shortened = RadixKey(key.token_ids, key.extra_key, limit=min(len(key), most))
    return replace(params, key=shortened)


def found_length(result: MatchResult) -> int:
    """Slots that the tree holds of what was looked for."""
    return len(result.device_indices)


def count_matched(req: Req, tokens: int) -> None:
    """Count `tokens` more in the prefix that a waiting request is weighed by."""
    req.num_matched_prefix_tokens += tokens


def node_ids(node: TreeNode) -> array[int]:
    """The ids of a node of the tree."""
    return node.key.raw_token_ids()


def prefix_length(req: Req) -> int:
    """Slots that are not computed in the next prefill."""
    return len(req.prefix_indices)


def prefill_behind(req: Req, slots: torch.Tensor, delta: int) -> None:
    """Prefill the rest of a request's tokens behind `slots`, which hold `delta` tokens more."""
    physical = len(slots)
    rest = tokens(req)[physical + delta :]
    req.prefix_indices = slots
    # Only what lies behind the prefix is read of these ids.
    req.full_untruncated_fill_ids = array("q", bytes(8 * physical)) + rest
    req.set_extend_range(physical, physical + len(rest))


def keep_from_tree(req: Req, table: torch.Tensor) -> None:
    """The chunk that was prefilled belongs to the request alone."""
    req.prefix_indices = table[req.req_pool_idx, : req.extend_range.end].long()


def detach_from_tree(tree: RadixCache, req: Req, start: int) -> bool:
    """Make the slots of `req` from `start` on its own again, which it has found in the tree.

    Returns:
        False where other requests have come to share them.
    """
    path, first = [], len(req.prefix_indices)
    node = req.last_node
    # From the leaf up to the node that holds `start`, or begins there.
    while first > start:
        first -= len(node.key)
        path.append(node)
        node = node.parent
    rest = list(path[0].children.values())
    alone = all(set(above.children.values()) == {below} for below, above in pairwise(path))
    in_use = any(n.lock_ref > 1 for n in path) or any(n.children or n.lock_ref for n in rest)
    if in_use or not alone:
        return False
    # Leaves behind it that nobody holds would lose what they go on from.
    tree.dec_lock_ref(req.last_node)
    for leaf in rest:
        tree.token_to_kv_pool_allocator.free_segment(leaf.value, start_pos=0)
        tree._delete_leaf(leaf)
    if first < start:
        tree._split_node(path[-1].key, path[-1], start - first)
    req.last_node = path[-1].parent
    for node in path:
        tree._delete_leaf(node)  # Its slots are not freed: they are the request's.
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
    if not chain:
        return nullcontext()
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


def release(
    original: Callable[..., None],
    req: Req,
    tree: RadixCache,
    is_insert: bool,
    chain: Chain,
) -> int:
    """Release the slots of a request; with `is_insert` under the ids of `chain`.

    Returns:
        How many of its slots, from the first one on, have complete KV and so can be inserted.
    """
    with physical_tokens(req, chain):
        slots = req.effective_kv_committed_len() if chain else 0
        with prompt_in_tree(req):
            original(req, tree, is_insert=is_insert)
    return slots


def count_cached(req: Req, tokens: int) -> None:
    """Count `tokens` more as found in the prefix cache, once in a request's life as SGLang does."""
    if not req.retracted_stain:
        req.cached_tokens += tokens
        req.cached_tokens_device += tokens


def free(scheduler: Scheduler, slots: torch.Tensor) -> None:
    """`slots`, int64, are free: whole pages, each page's slots together and in order."""
    scheduler.token_to_kv_pool_allocator.free_segment(slots, start_pos=0)


def wait_for_reads(scheduler: Scheduler, always: bool) -> None:
    """Order the next write into the slot table behind the forward pass that may still read there.

    After each launch SGLang itself waits until a decode graph is about to be replayed, and where
    there is none for the whole pass; not on GPUs of AMD. What is read inside a graph comes later.

    Args:
        always: wait for whole forward passes, whatever the attention backend.
    """
    if not scheduler.enable_overlap:
        return
    if not always and scheduler._war_barrier_enabled:
        _, decode = scheduler.server_args.get_attention_backends()
        if decode in _READ_BEFORE_GRAPHS:
            return
    scheduler.schedule_stream.wait_stream(scheduler.forward_stream)


def queue_again(scheduler: Scheduler, req: Req) -> None:
    scheduler._add_request_to_queue(req)


def shrink_batch(batch: ScheduleBatch, cut: dict[int, int]) -> None:
    """Subtract from the batch's physical lengths, by index."""
    lengths = torch.zeros(len(batch.reqs), dtype=torch.int64, pin_memory=batch.seq_lens.is_cuda)
    for index, slots in cut.items():
        lengths[index] = slots
    # New tensors: the previous step's forward pass may still read the old ones.
    batch.seq_lens_cpu = batch.seq_lens_cpu - lengths
    batch.seq_lens = batch.seq_lens - lengths.to(batch.seq_lens.device, non_blocking=True)
    batch.seq_lens_sum = None
    # What was freed is offered to waiting requests, although nobody has finished.
    batch.batch_is_full = False


def prefilled_rows(batch: ScheduleBatch | None) -> torch.Tensor | None:
    """int64 [requests], rows of the slot table, if it is a prefill."""
    if batch is None or not batch.forward_mode.is_extend():
        return None
    return batch.req_pool_indices


def shift_positions(
    batch: ForwardBatch,
    offsets: Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor],
) -> None:
    """Add `offsets(rows, lengths, tokens)` to the RoPE positions, see `Engine.offsets`."""
    rows, tokens = batch.req_pool_indices, len(batch.positions)
    if batch.forward_mode.is_decode():
        batch.positions = batch.positions + offsets(rows, None, tokens)
    elif batch.forward_mode.is_extend():
        batch.positions += offsets(rows, batch.extend_seq_lens, tokens)


def longest_output(scheduler: Scheduler, req: Req, asked: int | None) -> int:
    """`max_new_tokens` as far as the context length and the server's own limit allow."""
    context = scheduler.model_config.context_len - len(req.origin_input_ids) - 2
    limit = scheduler.max_new_tokens_limit or context
    return max(0, min(context if asked is None else asked, context, limit))


def limit_output(req: Req, most: int, least: int) -> None:
    req.sampling_params.max_new_tokens = most
    req.sampling_params.min_new_tokens = least


def remaining_output(req: Req) -> int:
    return max(0, req.sampling_params.max_new_tokens - len(req.output_ids))


def expected(adder: PrefillAdder, slots: int) -> float:
    """What SGLang reserves for a running request that takes at most `slots` more."""
    return _clipped(slots) * adder.new_token_ratio


def _clipped(slots: int) -> int:
    """SGLang's own upper bound of what it expects a request to write."""
    from sglang.srt.managers import schedule_policy

    return min(slots, schedule_policy.CLIP_MAX_NEW_TOKENS)


@contextmanager
def expecting(req: Req, slots: int) -> Iterator[None]:
    """Inside, SGLang expects `req` to take at most `slots` for its output."""
    from sglang.srt.managers import schedule_policy

    clip, ignores_eos = schedule_policy.CLIP_MAX_NEW_TOKENS, req.sampling_params.ignore_eos
    schedule_policy.CLIP_MAX_NEW_TOKENS = _clipped(slots)
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
