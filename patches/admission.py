"""Admission: what a request will hold, not what it will write, is what the scheduler reserves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_tri import footprint
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import active, request_lifetime, request_settings, resume
from sglang_tri.patches import sglang_0517 as adapter

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_tri.config import KvPolicyConfig


def bound_output(original: Callable[..., None], scheduler: Scheduler, req: Req) -> None:
    """AROUND init_req_max_new_tokens: an output may be longer than the pool.

    SGLang clips outputs to the pool. Those of a policy are bounded by the context length, if what
    they hold at any time fits; if it never can, the request is refused.
    """
    asked, least = req.sampling_params.max_new_tokens, req.sampling_params.min_new_tokens
    original(scheduler, req)
    settings = _settings(req)
    clipped = req.sampling_params.max_new_tokens
    wanted = adapter.longest_output(scheduler, req, asked)
    if settings is None or wanted <= clipped:
        return
    regions = 2 if active.get().think_end and settings.continues else 1
    needed = footprint.slots_for(settings, wanted, scheduler.page_size, regions)
    if needed <= clipped:
        req.sampling_params.max_new_tokens = wanted
        req.sampling_params.min_new_tokens = min(least, wanted)
    elif asked is not None:
        pool, prompt = scheduler.max_total_num_tokens, len(req.origin_input_ids)
        request_lifetime.refuse(
            req,
            f"a prompt of {prompt} tokens and max_new_tokens {asked} need {prompt} + {needed} KV "
            f"slots at once (--kv-budget {settings.budget} and --kv-interval "
            f"{settings.interval}{', for thinking and answer each' if regions == 2 else ''}), the "
            f"pool has {pool}: use a shorter prompt, max_new_tokens {max(0, clipped)} or less, or "
            "a smaller --kv-budget.",
        )


def _settings(req: Req) -> KvPolicyConfig | None:
    """The request's settings; None where its policy is `none`, or it is refused in any case."""
    if req.to_finish is not None:
        return None
    server = active.get().runtime.settings
    try:
        settings = request_settings.settings_of(server, adapter.custom_params(req))
    except KvPolicyError:
        return None  # `request_lifetime.admit` says so.
    return settings if settings.enabled else None


def reserve(
    original: Callable[..., Any], adder: PrefillAdder, req: Req, *args: Any, **kwargs: Any
) -> Any:
    """A waiting request needs no more than budget + interval."""
    state = adapter.state_of(req)
    if state is None:
        return original(adder, req, *args, **kwargs)
    remaining = adapter.remaining_output(req)
    if not state.resumed:
        slots = footprint.slots_for(state.settings, remaining, adder.page_size)
        with adapter.expecting(req, slots):
            return original(adder, req, *args, **kwargs)
    # Of its tokens, too, only as many as fit into its regions are in slots at once.
    rest = adapter.remaining_prefill(req)
    room = resume.limit(req, state) - len(req.prefix_indices)
    with adapter.expecting(req, min(rest + remaining, room) - rest):
        return original(adder, req, *args, **kwargs)


def cut_chunk(
    original: Callable[..., Any], adder: PrefillAdder, req: Req, *args: Any, **kwargs: Any
) -> Any:
    """AROUND add_one_req and add_chunked_req: a resumed request is prefilled round by round."""
    state = adapter.state_of(req)
    most = resume.tokens_until_round(req, state) if state and state.resumed else None
    if most is None or adapter.fits_whole(adder, req, most):
        return reserve(original, adder, req, *args, **kwargs)
    if adapter.has_chunk(active.get().scheduler, adder, req):
        return adapter.try_later()
    with adapter.chunk_of(adder, most):
        return reserve(original, adder, req, *args, **kwargs)


def preempt(
    original: Callable[..., bool], adder: PrefillAdder, req: Req, *args: Any, **kwargs: Any
) -> bool:
    """AROUND preempt_to_schedule: the same for a request that displaces others."""
    displaces: bool = reserve(original, adder, req, *args, **kwargs)
    active.get().preempted = adder.preempt_list
    return displaces


def requeue_preempted(
    result: tuple[Any, Any], scheduler: Scheduler, *args: Any, **kwargs: Any
) -> None:
    """AFTER _get_new_batch_prefill_raw: SGLang forgets whom it preempted if then nobody can run.

    That happens where the prompt, which it counts only after it has preempted, does not fit.
    """
    preempted, active.get().preempted = active.get().preempted, []
    if result[0] is None:
        for req in preempted:
            scheduler._add_request_to_queue(req)


def reserve_running(original: Callable[..., float], adder: PrefillAdder, req: Req) -> float:
    """AROUND _get_running_request_total_token_offset: on top of what the request holds."""
    state = adapter.state_of(req)
    if state is None:
        return original(adder, req)
    physical, remaining = adapter.physical_length(req), adapter.remaining_output(req)
    slots = footprint.more_slots(state, physical, remaining, adder.page_size)
    return adapter.clip_estimate(slots) * adder.new_token_ratio
