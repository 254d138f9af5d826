"""Compile every kernel that a server can launch before it says that it is ready."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.execution import execute
from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.select import MODES
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.parts import Parts
from sglang_tri.policies import POLICIES
from sglang_tri.policies.base import Candidates
from sglang_tri.runtime import Runtime


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
    for settings in variants:
        policy = POLICIES[settings.policy]
        if not runtime.has_statistics_for(policy):
            continue  # No request may ask for it, see `Runtime.check_runnable`.
        candidates = _padding(runtime, settings)
        # A workspace in which each layer is a part of its own.
        small = Workspace(Parts.smallest(candidates.geometry()), runtime.cache.device)
        for workspace in (runtime.workspace, small):
            execute(policy(), replace(candidates, workspace=workspace), runtime.cache)
    if runtime.cache.device.type == "cuda":
        torch.cuda.synchronize(runtime.cache.device)


def _padding(runtime: Runtime, settings: KvPolicyConfig) -> Candidates:
    """One request of two pages, both the padding page, of which one is kept."""
    device, page_size = runtime.cache.device, runtime.page_size
    numbers = torch.tensor([0, 2, 0, 0, page_size, 0], dtype=torch.int32, device=device)
    pages = Pages(numbers[:2], numbers[2:4], numbers[4:5], numbers[5:], page_size, 2 * page_size)
    logical = torch.zeros(1, dtype=torch.int64, device=device)
    return runtime.candidates(settings, pages, logical, Budgets.equal(1, page_size, 0, device))
