"""Do all that a round does before a server says that it is ready: compile, load, allocate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.engine import Engine
from sglang_tri.errors import KvPolicyError
from sglang_tri.history import Lookup
from sglang_tri.kernels.moves import MODES
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies import POLICIES
from sglang_tri.request.region import Region
from sglang_tri.request.request import Request
from sglang_tri.round.plan import DueRequest, Round, plan
from sglang_tri.round.run import RoundSize, run, slice_requests

# How many are planned: the tensors of one alone would not be joined. One of them is executed.
_REQUESTS = 2


def all_settings(settings: KvPolicyConfig, per_request: bool) -> list[KvPolicyConfig]:
    """Settings whose rounds may differ in their kernels: the server's, or what requests may say."""
    if not per_request:
        return [settings]
    return [
        replace(settings, policy=policy, eviction_mode=mode)
        for policy in POLICIES
        for mode in MODES
    ]


def warm_up(engine: Engine, variants: Iterable[KvPolicyConfig]) -> None:
    """A round of each variant, whole and in chunks, over the page that pads batches.

    No argument of a kernel is looked at when it is compiled, so these rounds stand for all.
    """
    planned = _plan(engine)
    for settings in variants:
        try:
            engine.check_runnable(settings)
        except KvPolicyError:
            continue  # No request may ask for it.
        policy = POLICIES[settings.policy]()
        if policy.needs_positions:
            engine.cache.place(planned)
        candidates = engine.candidates(replace(planned, settings=settings))
        candidates = slice_requests(candidates, 0, 1)
        # A workspace in which each layer is a chunk of its own.
        small = Workspace(RoundSize.of(candidates, policy).least_bytes, engine.cache.device)
        for workspace in (engine.workspace, small):
            run(policy, replace(candidates, workspace=workspace), engine.cache)
    _shift(engine, planned)
    if engine.cache.device.type == "cuda":
        torch.cuda.synchronize(engine.cache.device)


def _plan(engine: Engine) -> Round:
    """Of requests of two pages, both the padding page, of which one is kept."""
    page_size = engine.page_size
    page = torch.arange(page_size, dtype=torch.int32, device=engine.cache.device)
    # One page holds fewer than the most recent tokens that continuation needs.
    settings = replace(engine.settings, recent=0, reuse="prompt")
    due = []
    for _ in range(_REQUESTS):
        request = Request("", settings, Lookup(None), 0, page_size)
        request.regions = [Region(0, 0, page_size, 2 * page_size, 0, 0)]
        due.append(DueRequest(request, 0))
    (planned,), _ = plan(due, page.repeat(1, 2), page_size)
    return planned


def _shift(engine: Engine, planned: Round) -> None:
    """What follows a round: positions ahead of slots, by zero in the end."""
    rows = planned.rows
    engine.deltas[rows] = planned.deltas
    engine.start_prefill(rows, [None] * _REQUESTS)
    lengths = rows  # The padding row is row 0.
    for tokens in (None, (lengths + 1).int()):
        offsets = engine.offsets(rows, tokens, _REQUESTS)
        positions = lengths + offsets
        positions += offsets
