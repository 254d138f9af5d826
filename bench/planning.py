"""Time that planning takes on the scheduler's thread, with SGLang's own allocator and row pool."""

from __future__ import annotations

import statistics
import time
from array import array
from types import SimpleNamespace
from typing import Any

import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.engine import Engine
from sglang_tri.history import Lookup
from sglang_tri.patches import scheduler
from sglang_tri.patches.versions import scheduling
from sglang_tri.request.request import Request
from sglang_tri.round.run import KvCache

BUDGET, INTERVAL, PROMPT = 256, 64, 128
REPEATS = 200


def measure(requests: int) -> dict[str, float]:
    """Median microseconds of one call of the planning hook for a batch of `requests`.

    Returns:
        `idle_step_us`: a step in which nothing is due; `due_request_us`: a step in which all are
        due, divided by their number.
    """
    batch = _make_batch(requests)
    scheduler.plan_rounds(batch)
    idle = _median_us(lambda: scheduler.plan_rounds(batch), lambda: None)
    due = _median_us(lambda: scheduler.plan_rounds(batch), lambda: _fill(batch))
    return {"requests": requests, "idle_step_us": idle, "due_request_us": due / requests}


def _median_us(call: Any, prepare: Any) -> float:
    times = []
    for _ in range(REPEATS):
        prepare()
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def _make_batch(requests: int) -> Any:
    """A decode batch whose requests have just been prefilled."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    length = PROMPT + BUDGET + INTERVAL
    size = requests * length
    cache = [torch.zeros(1, 1, 2)]
    settings = KvPolicyConfig(policy="streaming", budget=BUDGET, interval=INTERVAL)
    engine = Engine(settings, KvCache.of(cache, cache, 1), requests + 1)
    allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", None, need_sort=False)
    rows = allocator.alloc(size).view(requests, length).int()
    reqs = [
        SimpleNamespace(
            req_pool_idx=index,
            kv_committed_len=PROMPT,
            kv=SimpleNamespace(kv_allocated_len=PROMPT),
            output_ids=array("q"),
            kv_policy_state=Request(str(index), settings, Lookup(None), PROMPT),
        )
        for index in range(requests)
    ]
    sglang: Any = SimpleNamespace(
        enable_overlap=False,
        req_to_token_pool=SimpleNamespace(req_to_token=rows),
        token_to_kv_pool_allocator=allocator,
    )
    scheduler.activate(scheduler.Active(engine, sglang))
    return SimpleNamespace(
        reqs=reqs,
        seq_lens=torch.full((requests,), PROMPT),
        seq_lens_cpu=torch.full((requests,), PROMPT),
        seq_lens_sum=None,
    )


def _fill(batch: Any) -> None:
    """Make every request due again, as if it had decoded until its region was full."""
    active = scheduler.active()
    active.engine._planned.clear()
    for req in batch.reqs:
        scheduling.set_physical_length(req, PROMPT + BUDGET + INTERVAL)
    active.scheduler.token_to_kv_pool_allocator.clear()  # type: ignore[attr-defined]
