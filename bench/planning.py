"""Time that planning takes on the scheduler's thread, with SGLang's own allocator and row pool."""

from __future__ import annotations

import statistics
import timeit
from array import array
from collections.abc import Callable
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
LENGTH = PROMPT + BUDGET + INTERVAL
REPEATS = 200


def measure(requests: int) -> dict[str, float]:
    """Median microseconds of one call of the planning hook for a batch of `requests`.

    Returns:
        `idle_step_us`: a step in which nothing is due; `due_request_us`: a step in which all are
        due, divided by their number.
    """
    batch = _make_batch(requests)

    def median_us(prepare: Callable[[], None]) -> float:
        plan = timeit.Timer(lambda: scheduler.plan_rounds(batch), prepare)
        return 1e6 * statistics.median(plan.repeat(REPEATS, number=1))

    idle, due = median_us(lambda: None), median_us(lambda: _fill(batch))
    return {"requests": requests, "idle_step_us": idle, "due_request_us": due / requests}


def _make_batch(requests: int) -> Any:
    """A decode batch whose requests have just been prefilled."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    cache = [torch.zeros(1, 1, 2)]
    settings = KvPolicyConfig(policy="streaming", budget=BUDGET, interval=INTERVAL)
    engine = Engine(settings, KvCache.of(cache, cache, 1), requests + 1)
    size = requests * LENGTH
    allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", None, need_sort=False)
    sglang: Any = SimpleNamespace(
        enable_overlap=False,
        req_to_token_pool=SimpleNamespace(
            req_to_token=allocator.alloc(size).view(requests, LENGTH).int()
        ),
        token_to_kv_pool_allocator=allocator,
    )
    scheduler.activate(scheduler.Active(engine, sglang))
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
    lengths = torch.full((requests,), PROMPT)
    batch: Any = SimpleNamespace(
        reqs=reqs, seq_lens=lengths, seq_lens_cpu=lengths.clone(), seq_lens_sum=None
    )
    scheduler.plan_rounds(batch)  # Regions open.
    return batch


def _fill(batch: Any) -> None:
    """Make every request due again, as if it had decoded until its region was full."""
    active = scheduler.active()
    active.engine._planned.clear()
    for req in batch.reqs:
        scheduling.set_physical_length(req, LENGTH)
    active.scheduler.token_to_kv_pool_allocator.clear()  # type: ignore[attr-defined]
