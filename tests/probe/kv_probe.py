"""A plugin of the tests' own that looks into the scheduler's pool, independent of the project.

It answers when a file named `ask` appears in `$KV_PROBE_FOLDER`: digests of the slots that the
radix tree owns, the most slots that were ever in use, and what retracted requests resumed from.
Lengths come from the allocator. How it finds the engine before the first request is in `start`.

From an `ask` that says "profile" to the next one it notes the files of all functions that run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from pathlib import Path

_peak = {"used": 0}
_preempted = {"times": 0}
_resumed = {}
# Files by the innermost of our hooks on rounds that their functions ran in, "" for none.
_files = {}
_inside = []
ROUND_HOOKS = ("plan_rounds", "run_rounds")


def load() -> None:
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    prefix = "sglang.srt.managers."
    HookRegistry.register(
        prefix + "schedule_batch.ScheduleBatch.prepare_for_decode", _watch, HookType.AFTER
    )
    # Without the registry, which takes one plugin's hook for a function.
    _after(PrefillAdder, "preempt_to_schedule", _preempt)
    _after(PrefillAdder, "add_one_req", _resume)
    HookRegistry.register(
        prefix + "scheduler.Scheduler.process_input_requests", _answer, HookType.AFTER
    )
    HookRegistry.register(prefix + "scheduler.Scheduler.run_event_loop", _start, HookType.BEFORE)


def _after(owner, name, hook):
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        hook(result, *args, **kwargs)
        return result

    setattr(owner, name, wrapper)


def _watch(result, batch):
    allocator = batch.token_to_kv_pool_allocator
    _peak["used"] = max(_peak["used"], allocator.size - allocator.available_size())


def _preempt(result, *args):
    _preempted["times"] += bool(result)


def _resume(result, adder, req, *args, **kwargs):
    """Of a request that was retracted: its output tokens, and how many tokens were found."""
    if req.retraction_count and adder.can_run_list and adder.can_run_list[-1] is req:
        compressed = req.seqlen - len(req.full_untruncated_fill_ids)
        found = len(req.prefix_indices) + compressed
        _resumed.setdefault(req.rid, []).append([len(req.output_ids), found])


def _start(scheduler):
    folder = Path(os.environ["KV_PROBE_FOLDER"])
    folder.mkdir(exist_ok=True)
    allocator, rows = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool
    pool = allocator.get_kvcache()
    model = scheduler.tp_worker.model_runner.model
    report = {
        "free": allocator.available_size(),
        "size": allocator.size,
        "free_rows": len(rows.free_slots),
        "rows": rows.size,
        "tree": scheduler.tree_cache.total_size(),
        "written": sum(int(b.count_nonzero()) for b in (*pool.k_buffer, *pool.v_buffer)),
        "row_entries": int(rows.req_to_token.count_nonzero()),
        "forward_hooks": sum(len(m._forward_pre_hooks) for m in model.modules()),
        "in_order": allocator.free_pages.tolist() == sorted(allocator.free_pages.tolist()),
    }
    (folder / "start").write_text(json.dumps(report))


def _note(frame, event, argument):
    code = frame.f_code
    if "sglang_tri" not in code.co_filename:
        return
    if event == "call":
        if code.co_name in ROUND_HOOKS:
            _inside.append(code.co_name)
        _files.setdefault(_inside[-1] if _inside else "", set()).add(code.co_filename)
    elif event == "return" and code.co_name in ROUND_HOOKS:
        _inside.pop()


def _answer(result, scheduler, requests):
    folder = Path(os.environ["KV_PROBE_FOLDER"])
    if not (folder / "ask").exists():
        return
    sys.setprofile(None)
    report = {
        "files": {hook: sorted(files) for hook, files in _files.items()},
        "peak_used": _peak["used"],
        "preempted": _preempted["times"],
        "resumed": _resumed,
        "tree": _tree_digests(scheduler),
        "free": scheduler.token_to_kv_pool_allocator.available_size(),
        "size": scheduler.token_to_kv_pool_allocator.size,
    }
    _peak["used"] = 0
    partial = folder / "partial"
    partial.write_text(json.dumps(report))
    _files.clear()
    if (folder / "ask").read_text() == "profile":
        sys.setprofile(_note)
    (folder / "ask").unlink()
    partial.rename(folder / "answer")


def _tree_digests(scheduler):
    """Digest of K and V of every slot in the tree, by the keys and pages that lead to it."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    page = scheduler.page_size
    digests = {}
    todo = [(scheduler.tree_cache.root_node, "")]
    while todo:
        node, path = todo.pop()
        for child in node.children.values():
            slots, prefix = child.value.tolist(), path
            tokens = list(child.key.token_ids)[: len(slots)]
            for first in range(0, len(slots), page):
                step = f"{prefix} {child.key.extra_key} {tokens[first : first + page]}"
                prefix = hashlib.sha1(step.encode()).hexdigest()
                for slot in slots[first : first + page]:
                    digests[f"{prefix}:{slot % page}"] = [slot, _digest(pool, slot)]
            todo.append((child, prefix))
    return digests


def _digest(pool, slot):
    content = hashlib.sha1()
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        content.update(buffer[slot].contiguous().numpy().tobytes())
    return content.hexdigest()
