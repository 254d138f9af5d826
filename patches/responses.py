"""Responses: `meta_info["kv_policy"]`, and the report of the server's counters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from sglang_tri.patches import active, arrival

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

KEY = "kv_policy"
# In the scheduler's message that it is ready; taken out again by the main process.
READY = "_kv_policy"


def collect(manager: TokenizerManager, recv_obj: Any) -> None:
    """BEFORE _handle_batch_output: take our entry out of the per-token information.

    SGLang would hand it to the user as a list with one element for each output token.
    """
    from sglang.srt.managers.io_struct import (
        BatchEmbeddingOutput,
        unwrap_from_pickle,
        wrap_as_pickle,
    )

    if isinstance(recv_obj, BatchEmbeddingOutput) or recv_obj.customized_info is None:
        return
    info = unwrap_from_pickle(recv_obj.customized_info)
    ours = info.pop(KEY, None)
    if ours is None:
        return
    recv_obj.customized_info = wrap_as_pickle(info) if info else None
    for rid, values in zip(recv_obj.rids, ours, strict=True):
        state = manager.rid_to_state.get(rid)
        if state is not None and values and values[-1] is not None:
            setattr(state, KEY, values[-1])


async def deliver(
    original: Callable[..., AsyncIterator[dict[str, Any]]],
    manager: TokenizerManager,
    obj: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[dict[str, Any]]:
    """AROUND _wait_one_response: add what `collect` took, as a plain dict."""
    state = manager.rid_to_state[obj.rid]
    async for response in original(manager, obj, *args, **kwargs):
        info = vars(state).get(KEY)
        if info is not None:
            response["meta_info"][KEY] = info
        yield response


def report_state(result: GetInternalStateReqOutput, *args: Any, **kwargs: Any) -> None:
    """AFTER get_internal_state: the counters, for `/server_info`."""
    found = active.get()
    report = found.runtime.report() | found.aliases.report()
    result.internal_state[KEY] = report | {"statistics": found.statistics}


async def add_refused(
    original: Callable[..., Awaitable[list[dict[str, Any]]]], manager: TokenizerManager
) -> list[dict[str, Any]]:
    """AROUND TokenizerManager.get_internal_state: requests that never reached the scheduler.

    Another engine in this process may have no policy, and so no report.
    """
    states = await original(manager)
    for report in (state[KEY] for state in states if KEY in state):
        report["requests_refused"] += arrival.count(manager)
    return states


def report_ready(result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """AFTER get_init_info: tell the main process that the policy runs (see `launch.confirm`)."""
    result[READY] = active.get().runtime.settings.policy


def report_usage(result: list[str], *args: Any, **kwargs: Any) -> list[str]:
    """AFTER get_decode_usage_msg_parts: two more words in the "Decode batch" log line."""
    counters = active.get().runtime.counters
    return [*result, f"evicted: {counters.evicted_tokens}, kv-rounds: {counters.rounds}"]
