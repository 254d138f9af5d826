"""Do all that a round does before a server says that it is ready: compile, load, allocate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from sglang_tri import planning
from sglang_tri.aliases import Lookup
from sglang_tri.config import KvPolicyConfig
from sglang_tri.execution import execute
from sglang_tri.kernels.select import MODES
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.parts import Parts
from sglang_tri.policies import POLICIES
from sglang_tri.rounds import Due, Region, RequestState, Round
from sglang_tri.runtime import Runtime

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


def run(runtime: Runtime, variants: Iterable[KvPolicyConfig]) -> None:
    """A round of each variant, whole and in parts, over the page that pads batches.

    No argument of a kernel is looked at when it is compiled, so these rounds stand for all.
    """
    planned = _plan(runtime)
    for settings in variants:
        policy = POLICIES[settings.policy]
        if not runtime.has_statistics_for(policy):
            continue  # No request may ask for it, see `Runtime.check_runnable`.
        candidates = runtime.candidates(settings, planned.pages, planned.logical, planned.budgets)
        candidates = candidates.of_requests(0, 1)
        # A workspace in which each layer is a part of its own.
        small = Workspace(Parts.smallest(candidates.geometry()), runtime.cache.device)
        for workspace in (runtime.workspace, small):
            execute(policy(), replace(candidates, workspace=workspace), runtime.cache)
    _shift(runtime, planned)
    if runtime.cache.device.type == "cuda":
        torch.cuda.synchronize(runtime.cache.device)


def _plan(runtime: Runtime) -> Round:
    """Of requests of two pages, both the padding page, of which one is kept."""
    page_size = runtime.page_size
    page = torch.arange(page_size, dtype=torch.int32, device=runtime.cache.device)
    region = Region(0, 0, page_size, 2 * page_size, 0, 0)
    # One page holds fewer than the most recent tokens that continuation needs.
    state = RequestState("", replace(runtime.settings, recent=0, reuse="prompt"), Lookup(None))
    due = [Due(state, region, 0) for _ in range(_REQUESTS)]
    planned, freed = planning.plan(due, [0] * _REQUESTS, page.repeat(1, 2), page_size)
    torch.cat(freed).long()
    return planned


def _shift(runtime: Runtime, planned: Round) -> None:
    """What follows a round: shorter lengths, and positions ahead of slots. All of it by zero."""
    rows = planned.rows
    runtime.deltas[rows] = planned.deltas
    lengths = planned.logical - planned.deltas
    for tokens in (None, (lengths + 1).int()):
        offsets = runtime.offsets(rows, tokens, _REQUESTS)
        positions = lengths + offsets
        positions += offsets
    runtime.start_prefill(rows, [None] * _REQUESTS)
