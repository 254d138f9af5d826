"""Decode: plan rounds when a batch is prepared, run them before its forward pass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_tri.patches import active, thinking
from sglang_tri.patches import sglang_0517 as adapter
from sglang_tri.rounds import Due

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_tri.runtime import Runtime

# Set to 1, each round waits for the whole forward pass before it, whatever the attention backend.
WAIT = "SGLANG_KV_POLICY_WAIT"


def plan_rounds(batch: ScheduleBatch, selected_indices: list[int] | None = None) -> None:
    """BEFORE check_decode_mem: what a round frees is there when the scheduler looks for memory."""
    if selected_indices is not None:
        return
    runtime = active.get().runtime
    due = _find_due(batch, runtime)
    if due:
        _shrink(batch, due)


def _find_due(batch: ScheduleBatch, runtime: Runtime) -> dict[int, Due]:
    """The requests with a full private region, by their index in the batch."""
    due = {}
    may_think = bool(active.get().think_end)
    for index, req in enumerate(batch.reqs):
        state = adapter.state_of(req)
        if state is None:
            continue
        length = adapter.physical_length(req)
        if not state.regions or (may_think and thinking.ends(req, state, length)):
            state.open_region(length, runtime.page_size)
        region = state.regions[-1]
        if length >= region.due_at:
            due[index] = Due(state, region, req.req_pool_idx)
    return due


def _shrink(batch: ScheduleBatch, due: dict[int, Due]) -> None:
    requests = [(batch.reqs[index], request) for index, request in due.items()]
    plan(requests, batch.req_to_token_pool.req_to_token, batch.token_to_kv_pool_allocator)
    pinned = batch.seq_lens.is_cuda
    cut = torch.zeros(len(batch.reqs), dtype=torch.int64, pin_memory=pinned)
    for index, request in due.items():
        cut[index] = request.candidates - request.region.kept
    adapter.shrink_batch(batch, cut)
    # What was freed is offered to waiting requests, although nobody has finished.
    batch.batch_is_full = False


def plan(
    requests: Sequence[tuple[Req, Due]],
    request_to_slot: torch.Tensor,
    allocator: BaseTokenToKVPoolAllocator,
) -> None:
    """Plan a round for each request; what it evicts is free, and lengths are shorter, at once."""
    _fence()
    freed = active.get().runtime.plan([due for _, due in requests], request_to_slot)
    allocator.free_segment(freed, start_pos=0)
    for req, due in requests:
        adapter.set_physical_length(req, due.region.start + due.region.kept)


def _fence() -> None:
    """Order the next write into the slot table behind the forward pass that may still read there.

    Without a round, SGLang only appends to a row, where no running forward pass reads.
    """
    scheduler = active.get().scheduler
    if scheduler.enable_overlap and (_always_waits() or not adapter.waits_for_reads(scheduler)):
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)


def _always_waits() -> bool:
    """Whether rounds wait for whole forward passes, to see what that costs."""
    return os.environ.get(WAIT) == "1"


def run_rounds(
    worker: TpModelWorker, batch: ScheduleBatch | None, *args: Any, **kwargs: Any
) -> None:
    """BEFORE forward_batch_generation: every earlier write and later read is on this stream."""
    runtime = active.get().runtime
    runtime.execute()
    if batch is not None and batch.forward_mode.is_extend():
        states = [adapter.state_of(req) for req in batch.reqs]
        runtime.start_prefill(batch.req_pool_indices, states)


def shift_positions(result: ForwardBatch, *args: Any, **kwargs: Any) -> None:
    """AFTER ForwardBatch.init_new: RoPE positions count tokens, everything else counts slots."""
    runtime = active.get().runtime
    if not runtime.shifts_positions:
        return
    rows, tokens = result.req_pool_indices, len(result.positions)
    if result.forward_mode.is_decode():
        result.positions = result.positions + runtime.offsets(rows, None, tokens)
    elif result.forward_mode.is_extend():
        result.positions += runtime.offsets(rows, result.extend_seq_lens, tokens)
