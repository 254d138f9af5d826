"""Compressed history in the radix tree: requests find it, leave it, and it is forgotten.

The tree is SGLang's own and sees one id per slot, always. What happens here is translation: from a
request's tokens to the ids that its compressed history went in under, before the tree is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_tri.history import Chain
from sglang_tri.patches import server
from sglang_tri.patches.scheduler import active, evict
from sglang_tri.patches.versions import scheduling
from sglang_tri.patches.versions.interface import (
    BasePrefixCache,
    MatchPrefixParams,
    MatchResult,
    Req,
    ScheduleBatch,
    TreeNode,
)
from sglang_tri.request.request import Request
from sglang_tri.round.plan import DueRequest

logger = logging.getLogger(__name__)


# A prefix is looked up, and prefilled behind.


def start_prefill(
    original: Callable[..., None],
    req: Req,
    tree_cache: BasePrefixCache | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND init_next_round_input: what is to be computed follows from the history found."""
    request = scheduling.state_of(req)
    if request is not None and tree_cache is None and request.stays_out_of_tree:
        _next_chunk(req, request)
        return
    if request is None or tree_cache is None:  # Of a next chunk the prefix stands.
        original(req, tree_cache, *args, **kwargs)
        return
    _forget_ids(req, request)
    request.rematching()
    original(req, tree_cache, *args, **kwargs)
    if scheduling.prefix_length(req) < request.chain.last_slot:
        request.matched(None)  # SGLang was told to ignore what it finds.
    if request.history:
        scheduling.use_physical_ids(req, request.chain)


def _next_chunk(req: Req, request: Request) -> None:
    """Between two chunks of its own tokens: the round that decoding would have run here."""
    if request.is_due(scheduling.prefix_length(req)):
        evict([(req, DueRequest(request, scheduling.row(req)))])
        request.chunked(scheduling.output(req))
    row = scheduling.slot_table(active().scheduler)[scheduling.row(req)]
    slots = row[: scheduling.physical_length(req)].long()
    scheduling.prefill_behind(req, slots, request.delta)


def _forget_ids(req: Req, request: Request) -> None:
    """SGLang takes the request's own tokens again where it was found under physical ids."""
    if request.history:
        scheduling.forget_physical_ids(req)


def refresh_ids(original: Callable[..., None], req: Req) -> None:
    """AROUND _refresh_fill_ids: SGLang would extend the physical ids by logical lengths."""
    request = scheduling.state_of(req)
    if request is None or request.history is None:
        original(req)
    else:
        scheduling.use_physical_ids(req, request.chain)


def match_prefix(
    original: Callable[..., MatchResult], tree: BasePrefixCache, params: MatchPrefixParams
) -> MatchResult:
    """AROUND RadixCache.match_prefix: the longest compressed history that the tree still holds."""
    req = scheduling.matching(params)
    request = None if req is None else scheduling.state_of(req)
    if req is None or request is None:
        return original(tree, params)
    aliases = active().engine.aliases
    most = request.prompt_length if request.resumed else None
    reuses = _may_reuse(req, request)
    for alias in request.histories(aliases, scheduling.tokens(req)) if reuses else ():
        first = None if request.is_own(alias) else most
        physical = scheduling.physical_params(params, alias.chain, first)
        result = original(tree, physical)
        if scheduling.found_length(result) >= alias.chain.last_slot:
            request.matched(alias)
            aliases.touch(alias)
            return result
        aliases.stale += 1
        aliases.drop(alias)
    _forget_ids(req, request)
    request.matched(None)
    if most is not None:
        params = scheduling.shortened_params(params, most)
    return original(tree, params)


def _may_reuse(req: Req, request: Request) -> bool:
    return _may_continue(req, request) and not scheduling.wants_prompt_logprobs(req)


def _may_continue(req: Req, request: Request) -> bool:
    return request.settings.continues and scheduling.kv_depends_only_on_tokens(req)


def count_matched(
    result: MatchResult, tree_cache: BasePrefixCache, req: Req, *args: Any, **kwargs: Any
) -> None:
    """AFTER match_prefix_for_req: SGLang weighs prefixes by the prefill that they save."""
    request = scheduling.state_of(req)
    if request is not None:
        scheduling.count_matched(req, request.chain.delta)


def admit(result: None, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
    """AFTER prepare_for_extend: a prefill is prepared.

    Usage reports count tokens, SGLang has counted slots. What a resumed request has left is its own
    again if nobody else goes on from it.
    """
    for req in scheduling.requests(batch):
        request = scheduling.state_of(req)
        if request is None:
            continue
        if not request.admitted:
            _count(req, request)
        left, detached = request.left, False
        if left is not None and request.found_own:
            tree, start = scheduling.tree(active().scheduler), left.regions[0].start
            detached = scheduling.detach_from_tree(tree, req, start)
        length, output = scheduling.prefilled_length(req), scheduling.output(req)
        request.prefilled(length, output, detached)


def _count(req: Req, request: Request) -> None:
    aliases = active().engine.aliases
    if _may_reuse(req, request):
        aliases.lookups += 1
        aliases.hits += request.history is not None
    scheduling.count_cached(req, request.chain.delta)


def cache_unfinished(
    original: Callable[..., None], tree: BasePrefixCache, req: Req, chunked: bool = False
) -> None:
    """AROUND cache_unfinished_req: what a resumed request has generated before is its own."""
    request = scheduling.state_of(req)
    if request is None or not request.stays_out_of_tree:
        original(tree, req, chunked=chunked)
    elif chunked:
        scheduling.keep_from_tree(req, scheduling.slot_table(active().scheduler))


# Slots are released.


def release(
    original: Callable[..., None], req: Req, tree_cache: BasePrefixCache, is_insert: bool = True
) -> None:
    """AROUND release_kv_cache: KV computed after an eviction is inserted under synthetic ids only.

    Also on retraction; where nobody may go on from it, it is freed.
    """
    request = scheduling.state_of(req)
    if request is None or not scheduling.has_slots(req):
        scheduling.release(original, req, tree_cache, is_insert, Chain())
        return
    engine, compressed = active().engine, request.compressed
    length = scheduling.physical_length(req)
    engine.released(request, length)
    if scheduling.is_finished(req):
        scheduling.publish_at_end(req, server.KEY, request.report(length))
    continues = _may_continue(req, request)
    chain, alias = request.chain, None
    if continues:
        chain = engine.aliases.extend(chain, (region.span for region in compressed))
    is_insert = continues if compressed else is_insert
    slots = scheduling.release(original, req, tree_cache, is_insert, chain)
    if compressed and continues:
        tokens = scheduling.tokens(req)
        alias = engine.aliases.remember(request.lookup, tokens, chain, request.history, slots)
    if scheduling.is_finished(req):
        request.finished()
    else:
        request.retracted(length, scheduling.output(req), alias)
    scheduling.forget_physical_ids(req)


# History is forgotten.


def forget_deleted(result: None, tree: BasePrefixCache, node: TreeNode) -> None:
    """AFTER _delete_leaf: what the tree evicts cannot be found again."""
    active().engine.aliases.drop_ids(scheduling.node_ids(node))


def forget_flushed(result: bool, *args: Any, **kwargs: Any) -> None:
    """AFTER flush_cache."""
    if result:
        active().engine.aliases.clear()


def forget_outdated(result: None, *args: Any, **kwargs: Any) -> None:
    """AFTER a weight update: nothing goes on from what other weights have computed."""
    engine = active().engine
    engine.aliases.clear()
    if engine.settings.calibrates:
        logger.warning(
            "The weights have changed, the query statistics of --kv-stats auto are those of the "
            "weights before: restart the server to measure the new ones."
        )
