"""Requests: their state when they are queued, their end when their slots are released."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import active, request_settings
from sglang_tri.patches import sglang_0517 as adapter
from sglang_tri.patches.responses import KEY
from sglang_tri.rounds import Suspended

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

    from sglang_tri.aliases import Alias
    from sglang_tri.rounds import RequestState
    from sglang_tri.spans import Span


def admit(scheduler: Scheduler, req: Req, is_retracted: bool = False) -> None:
    """BEFORE _add_request_to_queue: give a new request its state, refuse what can't be."""
    if adapter.has_state(req):
        return
    adapter.attach_state(req, None)
    if req.to_finish is not None:
        return  # It was refused already.
    try:
        _check_prompt(req)
        runtime = active.get().runtime
        settings = request_settings.settings_of(runtime.settings, adapter.custom_params(req))
        state = runtime.admit(req.rid, req.origin_input_ids, settings, req.extra_key)
        adapter.attach_state(req, state)
    except KvPolicyError as error:
        refuse(req, str(error))


def refuse(req: Req, reason: str) -> None:
    """End a request with a 400 before it is served; SGLang logs the reason with its id."""
    active.get().runtime.counters.requests_refused += 1
    req.set_finish_with_abort(reason)


def _check_prompt(req: Req) -> None:
    """Ids outside the vocabulary stand for compressed history: nobody may send them."""
    if not req.origin_input_ids:
        raise KvPolicyError("the prompt is empty: send a token at least.")
    position = adapter.token_outside_vocabulary(req)
    if position is not None:
        raise KvPolicyError(
            f"token {req.origin_input_ids[position]} at position {position} of the input is not in "
            f"the vocabulary: send ids from 0 to {req.vocab_size - 1}."
        )


def release(
    original: Callable[..., None], req: Req, tree_cache: BasePrefixCache, is_insert: bool = True
) -> None:
    """AROUND release_kv_cache: what was computed over evicted tokens never enters the tree as if
    it was not. It enters under ids of its own, also on retraction, or is freed.
    """
    state = adapter.state_of(req)
    if state is None or req.req_pool_idx is None:
        _release_slots(original, req, tree_cache, is_insert)
        return
    resident = adapter.physical_length(req)
    regions, history = state.regions, state.history
    compressed = active.get().runtime.close(state, resident)
    if req.finished():
        _publish(req, state, resident)
    if compressed and not _may_continue(req, state):
        _release_slots(original, req, tree_cache, False)
    elif compressed or state.history:
        spans = tuple(active.get().aliases.new_span(*region.span) for region in compressed)
        with adapter.physical_tokens(req, state.chain.then(*spans)):
            kept = req.effective_kv_committed_len()
            _release_slots(original, req, tree_cache, is_insert or bool(spans))
        alias = _remember(req, state, spans, kept)
        # A round that is due already would come between what it left and its last token.
        if alias is not None and spans and not req.finished() and resident < regions[-1].due_at:
            state.suspended = Suspended(alias, history, regions)
    else:
        _release_slots(original, req, tree_cache, is_insert)
    state.history = None
    adapter.forget_physical_ids(req)
    state.resumed = bool(req.output_ids) and not req.finished()


def _release_slots(
    original: Callable[..., None], req: Req, tree_cache: BasePrefixCache, is_insert: bool
) -> None:
    with adapter.prompt_in_tree(req):
        original(req, tree_cache, is_insert=is_insert)


def _may_continue(req: Req, state: RequestState) -> bool:
    return state.settings.continues and adapter.tokens_tell_all(req)


def _remember(req: Req, state: RequestState, spans: tuple[Span, ...], kept: int) -> Alias | None:
    """What lies in the first `kept` slots is in the tree now: make it known by its tokens.

    Returns:
        The alias of all of it, or None if a span is not in the tree.
    """
    tokens, history, chain = adapter.tokens(req), state.history, state.chain
    for span in spans:
        chain = chain.then(span)
        if span.last_slot <= kept:
            history = active.get().aliases.add(state.lookup, tokens, chain, history)
    return history if history is not None and history.chain == chain else None


def _publish(req: Req, state: RequestState, resident: int) -> None:
    info = {
        "history": state.first_history,
        "rounds": state.rounds,
        "evicted_tokens": state.evicted_tokens,
        "resident_slots": resident,
    }
    adapter.publish_at_end(req, KEY, info)
