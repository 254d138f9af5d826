"""Requests: their state when they are queued, their end when their slots are released."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import active
from sglang_tri.patches import sglang_0517 as adapter
from sglang_tri.patches.responses import KEY

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

# Settings per request are not public yet: tests switch them on.
PER_REQUEST = "SGLANG_KV_POLICY_PER_REQUEST"


def admit(scheduler: Scheduler, req: Req, is_retracted: bool = False) -> None:
    """BEFORE _add_request_to_queue: give a new request its state, refuse settings that can't be."""
    if adapter.has_state(req):
        return
    adapter.attach_state(req, None)
    overrides = adapter.request_overrides(req)
    try:
        if overrides and os.environ.get(PER_REQUEST) != "1":
            raise KvPolicyError(
                "custom_params['kv_policy'] is not public: set --kv-policy for the whole server."
            )
        adapter.attach_state(req, active.get().runtime.admit(req.rid, overrides))
    except KvPolicyError as error:
        req.set_finish_with_abort(str(error))


def release(
    original: Callable[..., None], req: Req, tree_cache: BasePrefixCache, is_insert: bool = True
) -> None:
    """AROUND release_kv_cache: what was computed over evicted tokens never enters the tree.

    The prompt is in the tree since its prefill; everything behind it is freed.
    """
    state = adapter.state_of(req)
    if state is None or req.req_pool_idx is None:
        original(req, tree_cache, is_insert=is_insert)
        return
    resident = adapter.physical_length(req)
    evicted = active.get().runtime.close(state, resident)
    if req.finished() and state.evicted_tokens:
        info = {
            "rounds": state.rounds,
            "evicted_tokens": state.evicted_tokens,
            "resident_slots": resident,
        }
        adapter.publish_at_end(req, KEY, info)
    original(req, tree_cache, is_insert=is_insert and not evicted)
