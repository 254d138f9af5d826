"""Retracted requests go on where they were, in no more slots than they would have held.

What one has left in the radix tree it takes back: its regions are private again. If that is gone,
its tokens are prefilled in chunks with the rounds between them that decoding had, so that it reads
what it read before, and never holds more than prompt, budget and interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_tri.patches import active, decode, thinking
from sglang_tri.patches import sglang_0517 as adapter
from sglang_tri.rounds import Due, Region, RequestState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def admitted(req: Req, state: RequestState) -> None:
    """A prefill of a resumed request is prepared: what it has generated becomes private."""
    suspended = state.suspended
    if suspended is not None and state.takes_back:
        start = suspended.regions[0].start
        if adapter.take_back(active.get().scheduler.tree_cache, req, start):
            state.history, state.regions = suspended.history, suspended.regions
        else:
            state.resumed = False  # Others go on from it: it stays as it is, like a prompt.
        state.suspended = None
    elif not state.regions:
        state.rounds = state.evicted_tokens = 0
        state.thinking = True
        region = first_region(req, state)
        if adapter.prefilled_length(req) > region.start:
            state.regions.append(region)
            _close_thinking(req, state)


def first_region(req: Req, state: RequestState) -> Region:
    """The private region behind the prompt of a request whose slots hold nothing of it yet."""
    chain, page_size = state.chain, active.get().runtime.page_size
    prompt = chain.physical_length(len(req.origin_input_ids))
    return Region.open(state.settings, prompt, chain.delta, page_size, state.early)


def next_chunk(req: Req, state: RequestState) -> None:
    """Between two chunks: run the round that decoding would have run here."""
    region, scheduler = state.regions[-1], active.get().scheduler
    rows = scheduler.req_to_token_pool.req_to_token
    if len(req.prefix_indices) == region.due_at:
        due = [(req, Due(state, region, req.req_pool_idx))]
        decode.plan(due, rows, scheduler.token_to_kv_pool_allocator)
        _close_thinking(req, state)
    physical = adapter.physical_length(req)
    adapter.continue_private(req, rows[req.req_pool_idx, :physical].long(), state.delta)


def _close_thinking(req: Req, state: RequestState) -> None:
    """Open the region behind the end of thinking, where the last one is not due before that."""
    position = thinking.position(req, state)
    if not state.thinking or position is None:
        return
    length = position - state.delta
    if length <= state.regions[-1].due_at:
        state.thinking = False
        state.open_region(length, active.get().runtime.page_size)


def tokens_until_round(req: Req, state: RequestState) -> int | None:
    """What of a resumed request can be prefilled at once; None if it takes back what it left."""
    if state.takes_back:
        return None
    region, physical = last_region(req, state), len(req.prefix_indices)
    in_prompt = not state.regions and physical < region.start
    return (region.start if in_prompt else region.due_at) - physical


def limit(req: Req, state: RequestState) -> int:
    """Physical length that a resumed request does not exceed before it decodes."""
    region = last_region(req, state)
    prefills_thinking = not state.takes_back and (state.thinking or not state.regions)
    if prefills_thinking and thinking.position(req, state) is not None:
        return region.limit + region.limit - region.start
    return region.limit


def last_region(req: Req, state: RequestState) -> Region:
    """The region that a resumed request will be in, or is in."""
    regions = state.regions
    if state.suspended is not None and state.takes_back:
        regions = state.suspended.regions
    return regions[-1] if regions else first_region(req, state)


def keeps_private(req: Req, chunked: bool) -> bool:
    """Whether what was prefilled belongs to the request alone, and not into the tree."""
    state = adapter.state_of(req)
    if state is None or not (state.resumed and state.regions):
        return False
    if chunked:
        adapter.keep_private(req, active.get().scheduler.req_to_token_pool.req_to_token)
    return True
