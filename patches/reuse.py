"""Compressed history in the radix tree: requests find it, and it is forgotten when it is gone.

The tree is SGLang's own and sees one id per slot, always. What happens here is translation: from a
request's tokens to the ids that its compressed history went in under, before the tree is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_tri.patches import active, resume
from sglang_tri.patches import sglang_0517 as adapter

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.base_prefix_cache import (
        BasePrefixCache,
        MatchPrefixParams,
        MatchResult,
    )
    from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode

    from sglang_tri.aliases import Alias
    from sglang_tri.rounds import RequestState

logger = logging.getLogger(__name__)

EXACT, COMPRESSED = "exact", "compressed"


def start_prefill(
    original: Callable[..., None],
    req: Req,
    tree_cache: BasePrefixCache | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND init_next_round_input: what is to be computed follows from the history found."""
    state = adapter.state_of(req)
    if state is None:
        original(req, tree_cache, *args, **kwargs)
        return
    if tree_cache is None:  # The next chunk: its prefix stands.
        if state.resumed and state.regions:
            resume.next_chunk(req, state)
        else:
            original(req, tree_cache, *args, **kwargs)
        return
    forget_history(req, state)
    state.uncounted = True
    original(req, tree_cache, *args, **kwargs)
    if len(req.prefix_indices) < state.chain.last_slot:
        state.history = None  # SGLang was told to ignore what it finds.
    if state.history:
        adapter.use_physical_ids(req, state.chain)


def forget_history(req: Req, state: RequestState) -> None:
    """The request's prefix is not looked up, or not held, under compressed history any more."""
    if state.history:
        state.history = None
        adapter.forget_physical_ids(req)


def refresh_ids(original: Callable[..., None], req: Req) -> None:
    """AROUND _refresh_fill_ids: SGLang would extend the physical ids by logical lengths."""
    state = adapter.state_of(req)
    if state is None or state.history is None:
        original(req)
    else:
        adapter.use_physical_ids(req, state.chain)


def match_prefix(
    original: Callable[..., MatchResult], tree: RadixCache, params: MatchPrefixParams
) -> MatchResult:
    """AROUND RadixCache.match_prefix: the longest compressed history that the tree still holds."""
    req = params.req
    state = None if req is None else adapter.state_of(req)
    if req is None or state is None:
        return original(tree, params)
    aliases = active.get().aliases
    # What a resumed request has generated is its own again: it looks for its prompt, or for all
    # that it left itself.
    most = len(req.origin_input_ids) if state.resumed else None
    for alias in _histories(req, state, most):
        own = state.suspended is not None and alias is state.suspended.alias
        key = adapter.physical_key(params.key, alias.chain, None if own else most)
        result = original(tree, replace(params, key=key))
        if len(result.device_indices) >= alias.chain.last_slot:
            state.history = alias
            aliases.touch(alias)
            return result
        aliases.stale += 1
        aliases.drop(alias)
    forget_history(req, state)
    if most is not None:
        params = replace(params, key=adapter.shortened_key(params.key, most))
    return original(tree, params)


def _histories(req: Req, state: RequestState, most: int | None) -> Iterator[Alias]:
    """Compressed histories that a request may go on from, the longest first."""
    if not _may_reuse(req, state):
        return
    own, aliases, tokens = state.suspended, active.get().aliases, adapter.tokens(req)
    if own is not None and own.alias in aliases and own.alias.chain.end < len(tokens):
        yield own.alias
    state.suspended = None
    for alias in aliases.find(state.lookup, tokens):
        if most is None or alias.chain.end < most:
            yield alias


def _may_reuse(req: Req, state: RequestState) -> bool:
    return (
        state.settings.continues
        and adapter.tokens_tell_all(req)
        and not adapter.wants_prompt_logprobs(req)
    )


def count_matched(
    result: MatchResult, tree_cache: BasePrefixCache, req: Req, *args: Any, **kwargs: Any
) -> None:
    """AFTER match_prefix_for_req: the scheduler weighs prefixes by the prefill that they save."""
    state = adapter.state_of(req)
    if state is not None:
        req.num_matched_prefix_tokens += state.chain.delta


def count_admission(result: None, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
    """AFTER prepare_for_extend: usage reports count tokens, SGLang has counted slots."""
    for req in batch.reqs:
        state = adapter.state_of(req)
        if state is None:
            continue
        if state.uncounted:
            state.uncounted = False
            _count(req, state)
        if state.resumed:
            resume.admitted(req, state)


def _count(req: Req, state: RequestState) -> None:
    aliases = active.get().aliases
    state.first_history = state.first_history or (COMPRESSED if state.history else EXACT)
    if _may_reuse(req, state):
        aliases.lookups += 1
        aliases.hits += state.history is not None
    adapter.count_cached(req, state.chain.delta)


def cache_unfinished(
    original: Callable[..., None], tree: RadixCache, req: Req, chunked: bool = False
) -> None:
    """AROUND cache_unfinished_req: what a resumed request has generated before is its own."""
    if not resume.keeps_private(req, chunked):
        original(tree, req, chunked=chunked)


def forget_deleted(result: None, tree: RadixCache, node: TreeNode) -> None:
    """AFTER _delete_leaf: what the tree evicts cannot be found again."""
    active.get().aliases.drop_ids(node.key.raw_token_ids())


def forget_flushed(result: bool, *args: Any, **kwargs: Any) -> None:
    """AFTER flush_cache."""
    if result:
        active.get().aliases.clear()


def forget_outdated(result: None, *args: Any, **kwargs: Any) -> None:
    """AFTER a weight update: nothing goes on from what other weights have computed."""
    found = active.get()
    found.aliases.clear()
    if found.runtime.settings.calibrates:
        logger.warning(
            "The weights have changed, the query statistics of --kv-stats auto are those of the "
            "weights before: restart the server to measure the new ones."
        )
