"""The scheduler process: the policy's engine, requests that are queued and admitted, and rounds."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sglang_tri.config import KvPolicyConfig, requests_may_set
from sglang_tri.engine import Engine, Observer
from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.patches import calibrate, hooks, server, table
from sglang_tri.patches.versions import loading, scheduling
from sglang_tri.patches.versions.interface import (
    ForwardBatch,
    ModelRunner,
    PrefillAdder,
    Req,
    ScheduleBatch,
    Scheduler,
)
from sglang_tri.request.region import slots_for
from sglang_tri.round.plan import DueRequest
from sglang_tri.round.run import WORKSPACE_BYTES, KvCache
from sglang_tri.round.trace import TraceWriter
from sglang_tri.round.warmup import all_settings, warm_up
from sglang_tri.statistics import Statistics
from sglang_tri.statistics.virtual_queries import virtual_queries

logger = logging.getLogger(__name__)

# Folder for files that record every round (see sglang_tri.round.trace).
TRACE = "SGLANG_KV_POLICY_TRACE"
# "1": they also hold the rows of K and V before and after it.
TRACE_ROWS = "SGLANG_KV_POLICY_TRACE_ROWS"
# "1": each round waits for the whole forward pass before it, whatever the attention backend.
WAIT = "SGLANG_KV_POLICY_WAIT"


@dataclass
class Active:
    """What the hooks of this process share.

    Attributes:
        engine: the policy's.
        scheduler: SGLang's.
        preempted: the requests that were preempted while the current batch was put together.
    """

    engine: Engine
    scheduler: Scheduler
    preempted: list[Req] = field(default_factory=list)


_active: Active | None = None
_workspace: Workspace | None = None


def activate(active: Active | None) -> None:
    """From now on the hooks of this process work with this."""
    global _active
    _active = active


def active() -> Active:
    """What is active; the hooks that call this are installed only together with it."""
    if _active is None:
        raise RuntimeError("the KV policy's hooks run, but its engine was never built")
    return _active


# The start.


def start(original: Callable[..., None], scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
    """AROUND Scheduler.__init__: without a policy no other hook is ever installed."""
    settings = server.attached(kwargs["server_args"] if "server_args" in kwargs else args[0])
    if settings is None:
        original(scheduler, *args, **kwargs)
        return
    hooks.install(table.stage(table.SCHEDULER))
    original(scheduler, *args, **kwargs)
    loading.check(scheduler)
    if not loading.has_prefix_cache(scheduler):
        settings = replace(settings, reuse="prompt")  # There is nothing to find anything in.
    engine = _build(scheduler, settings)
    activate(Active(engine, scheduler))
    statistics = _read_statistics(scheduler, engine)
    engine.check_runnable(settings)
    warm_up(engine, all_settings(settings, requests_may_set()))
    logger.info(
        "KV policy: %s, mode %s, budget %d, interval %d, reuse %s, statistics %s",
        settings.policy,
        settings.eviction_mode,
        settings.budget,
        settings.interval,
        settings.reuse,
        "none" if statistics is None else statistics.path or "not kept",
    )


def reserve_workspace(runner: ModelRunner, *args: Any, **kwargs: Any) -> None:
    """BEFORE alloc_memory_pool: rounds never take memory that the KV pool could have had."""
    global _workspace
    _workspace = Workspace(WORKSPACE_BYTES, loading.device(runner))


def _build(scheduler: Scheduler, settings: KvPolicyConfig) -> Engine:
    if _workspace is None:
        raise RuntimeError("the KV pool was allocated before the policy's memory was reserved")
    cache = loading.kv_cache(scheduler)
    rows, _ = scheduling.slot_table(scheduler).shape
    return Engine(
        settings,
        cache,
        rows,
        workspace=_workspace,
        observer=_observer(cache),
        think_mark=loading.think_mark(scheduler),
    )


def _observer(cache: KvCache) -> Observer | None:
    folder = os.environ.get(TRACE)
    if not folder:
        return None
    return TraceWriter(folder, cache.rows if os.environ.get(TRACE_ROWS) == "1" else ())


def _read_statistics(scheduler: Scheduler, engine: Engine) -> Statistics | None:
    """Give `engine` its virtual queries, from a file or measured now."""
    settings, keys = engine.settings, engine.cache.keys
    statistics = server.read_statistics(settings)
    if statistics is None and not settings.calibrates:
        return None
    rope = loading.rope(scheduler)
    if statistics is None:
        statistics = calibrate.automatic(scheduler, settings, rope)
    group = statistics.shape[1] // keys.heads
    with server.errors_name_flag("--kv-stats"):
        statistics.check_rope(rope)
        statistics.check_geometry(len(keys), keys.heads * group, keys.head_dim)
    engine.queries = virtual_queries(statistics, rope, engine.cache.device)
    engine.statistics = statistics.path or None
    return statistics


# Requests that wait.


def queue(scheduler: Scheduler, req: Req, is_retracted: bool = False) -> None:
    """BEFORE _add_request_to_queue: give a new request its state, refuse what can't be."""
    if scheduling.has_state(req):
        return
    scheduling.attach_state(req, None)
    if scheduling.is_refused(req):
        return
    engine = active().engine
    rid, prompt, scope = scheduling.identity(req)
    try:
        _check_prompt(prompt, scheduling.vocabulary(req))
        settings = engine.settings.for_request(scheduling.custom_params(req))
        scheduling.attach_state(req, engine.queue(rid, prompt, settings, scope))
    except KvPolicyError as error:
        _refuse(req, str(error))


def _refuse(req: Req, reason: str) -> None:
    active().engine.counters.requests_refused += 1
    scheduling.refuse(req, reason)


def _check_prompt(prompt: array[int], vocabulary: int) -> None:
    """Ids outside the vocabulary stand for compressed history: nobody may send them."""
    if not prompt:
        raise KvPolicyError("the prompt is empty: send a token at least.")
    ids = np.frombuffer(prompt, dtype=np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if outside.size:
        raise KvPolicyError(
            f"token {ids[outside[0]]} at position {outside[0]} of the input is not in "
            f"the vocabulary: send ids from 0 to {vocabulary - 1}."
        )


def bound_output(original: Callable[..., None], scheduler: Scheduler, req: Req) -> None:
    """AROUND init_req_max_new_tokens: an output may be longer than the pool.

    SGLang clips outputs to the pool. Those of a policy are bounded by the context length, if what
    they hold at any time fits; if it never can, the request is refused.
    """
    asked, least = scheduling.output_limits(req)
    original(scheduler, req)
    engine, settings = active().engine, _settings(req)
    clipped, _ = scheduling.output_limits(req)
    wanted = scheduling.longest_output(scheduler, req, asked)
    if settings is None or clipped is None or wanted <= clipped:
        return
    regions = 2 if engine.think_mark and settings.continues else 1
    needed = slots_for(settings, wanted, engine.page_size, regions)
    if needed <= clipped:
        scheduling.limit_output(req, wanted, min(least, wanted))
    elif asked is not None:
        prompt = len(scheduling.identity(req)[1])
        _refuse(
            req,
            f"a prompt of {prompt} tokens and max_new_tokens {asked} need {prompt} + {needed} KV "
            f"slots at once (--kv-budget {settings.budget} and --kv-interval "
            f"{settings.interval}{', for thinking and answer each' if regions == 2 else ''}), the "
            f"pool has {scheduling.pool_size(scheduler)}: use a shorter prompt, max_new_tokens "
            f"{max(0, clipped)} or less, or a smaller --kv-budget.",
        )


def _settings(req: Req) -> KvPolicyConfig | None:
    """The request's settings; None where its policy is `none`, or it is refused in any case."""
    if scheduling.is_refused(req):
        return None
    try:
        settings = active().engine.settings.for_request(scheduling.custom_params(req))
    except KvPolicyError:
        return None  # `queue` says so.
    return settings if settings.enabled else None


# Admission: what a request will hold, not what it will write, is what SGLang reserves.


def reserve(
    original: Callable[..., Any], adder: PrefillAdder, req: Req, *args: Any, **kwargs: Any
) -> Any:
    """A waiting request needs no more than budget + interval."""
    request = scheduling.state_of(req)
    if request is None:
        return original(adder, req, *args, **kwargs)
    length, to_come = scheduling.prefix_length(req), scheduling.remaining_output(req)
    if request.resumed:
        # Of its tokens, too, only as many as fit into its regions are in slots at once.
        rest = scheduling.remaining_prefill(req)
        room = request.most_slots(scheduling.output(req)) - length
        slots = min(rest + to_come, room) - rest
    else:
        slots = request.slots_to_come(length, to_come)
    with scheduling.expecting(req, slots):
        return original(adder, req, *args, **kwargs)


def cut_chunk(
    original: Callable[..., Any], adder: PrefillAdder, req: Req, *args: Any, **kwargs: Any
) -> Any:
    """AROUND add_one_req and add_chunked_req: a resumed request is prefilled round by round."""
    request = scheduling.state_of(req)
    most = None
    if request is not None and request.resumed:
        most = request.tokens_until_round(scheduling.prefix_length(req))
    if most is None or scheduling.fits_whole(adder, req, most):
        return reserve(original, adder, req, *args, **kwargs)
    if scheduling.has_chunk(active().scheduler, adder, req):
        return scheduling.try_later()
    with scheduling.chunk_of(adder, most):
        return reserve(original, adder, req, *args, **kwargs)


def preempt(
    original: Callable[..., bool], adder: PrefillAdder, req: Req, *args: Any, **kwargs: Any
) -> bool:
    """AROUND preempt_to_schedule: the same for a request that displaces others."""
    displaces: bool = reserve(original, adder, req, *args, **kwargs)
    active().preempted = scheduling.preempted(adder)
    return displaces


def requeue_preempted(
    result: tuple[Any, Any], scheduler: Scheduler, *args: Any, **kwargs: Any
) -> None:
    """AFTER _get_new_batch_prefill_raw: SGLang forgets whom it preempted if then nobody can run.

    That happens where the prompt, which it counts only after it has preempted, does not fit.
    """
    preempted, active().preempted = active().preempted, []
    if result[0] is None:
        for req in preempted:
            scheduling.queue_again(scheduler, req)


def reserve_running(original: Callable[..., float], adder: PrefillAdder, req: Req) -> float:
    """AROUND _get_running_request_total_token_offset: on top of what the request holds."""
    request = scheduling.state_of(req)
    if request is None:
        return original(adder, req)
    length, to_come = scheduling.physical_length(req), scheduling.remaining_output(req)
    return scheduling.expected(adder, request.slots_to_come(length, to_come))


# Rounds.


def plan_rounds(batch: ScheduleBatch, selected_indices: list[int] | None = None) -> None:
    """BEFORE check_decode_mem: what a round frees is there when the scheduler looks for memory."""
    if selected_indices is not None:
        return
    reqs = scheduling.requests(batch)
    due: dict[int, DueRequest] = {}
    for index, req in enumerate(reqs):
        request = scheduling.state_of(req)
        if request is None:
            continue
        length = scheduling.physical_length(req)
        request.decoded(length, scheduling.output(req))
        if request.is_due(length):
            due[index] = DueRequest(request, scheduling.row(req))
    if due:
        evict([(reqs[index], one) for index, one in due.items()])
        scheduling.shrink_batch(batch, {index: one.freed for index, one in due.items()})


def evict(due: Sequence[tuple[Req, DueRequest]]) -> None:
    """Plan a round for each request; what it evicts is free, and lengths are shorter, at once."""
    engine, scheduler = active().engine, active().scheduler
    # Rows are written again from now on, and no forward pass may still read them.
    scheduling.wait_for_reads(scheduler, os.environ.get(WAIT) == "1")
    freed = engine.plan_rounds([one for _, one in due], scheduling.slot_table(scheduler))
    scheduling.free(scheduler, freed)
    for req, one in due:
        scheduling.set_physical_length(req, one.remaining)


def run_rounds(worker: Any, batch: ScheduleBatch | None, *args: Any, **kwargs: Any) -> None:
    """BEFORE forward_batch_generation: every earlier write and later read is on this stream."""
    engine = active().engine
    engine.run_rounds()
    rows = scheduling.prefilled_rows(batch)
    if rows is not None and batch is not None:
        states = [scheduling.state_of(req) for req in scheduling.requests(batch)]
        engine.start_prefill(rows, states)


def shift_positions(result: ForwardBatch, *args: Any, **kwargs: Any) -> None:
    """AFTER ForwardBatch.init_new: RoPE positions count tokens, everything else counts slots."""
    engine = active().engine
    if engine.shifts_positions:
        scheduling.shift_positions(result, engine.offsets)


# Reports.


def report_ready(result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """AFTER get_init_info: tell the main process that the policy runs (see `server.confirm`)."""
    result[server.READY] = active().engine.settings.policy


def report_state(result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER get_internal_state: the counters, for `/server_info`."""
    result.internal_state[server.KEY] = active().engine.report()


def report_usage(result: list[str], *args: Any, **kwargs: Any) -> list[str]:
    """AFTER get_decode_usage_msg_parts: two more words in the "Decode batch" log line."""
    counters = active().engine.counters
    return [*result, f"evicted: {counters.evicted_tokens}, kv-rounds: {counters.rounds}"]
