"""The end of thinking: what was compressed before it is closed there, apart from the answer."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_tri.patches import active

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_tri.rounds import RequestState

# What chat templates end thinking with; a reasoning parser knows better.
MARKS = ("</think>", "[/THINK]", "◁/think▷")


def end_ids(scheduler: Scheduler) -> array[int]:
    """Token ids that end this model's thinking, by its reasoning parser or its chat template."""
    ids = scheduler.model_config.think_end_ids
    if not ids and scheduler.tokenizer is not None:
        template = _template(scheduler)
        mark = next((mark for mark in MARKS if mark in template), "")
        ids = scheduler.tokenizer.encode(mark, add_special_tokens=False)
    return array("q", ids or ())


def _template(scheduler: Scheduler) -> str:
    given = scheduler.server_args.chat_template
    if given and Path(given).is_file():
        return Path(given).read_text()
    template = scheduler.tokenizer.chat_template
    return template if isinstance(template, str) else ""


def ends(req: Req, state: RequestState, length: int) -> bool:
    """Whether the last of the request's `length` slots holds the end of its thinking.

    Only for models whose end of thinking is marked.
    """
    if not state.thinking:
        return False
    end = position(req, state)
    if end is None:
        return False
    state.thinking = length + state.delta < end
    return length + state.delta == end


def position(req: Req, state: RequestState) -> int | None:
    """Logical position behind the end of thinking; None where there is none, or not yet."""
    mark = active.get().think_end
    if not mark or not state.settings.continues:
        return None
    if state.think_end is None:
        found = _find(req.output_ids, mark, state.scanned)
        state.scanned = len(req.output_ids)
        if found is not None:
            state.think_end = len(req.origin_input_ids) + found
    return state.think_end


def _find(output_ids: array[int], mark: array[int], scanned: int) -> int | None:
    """Output tokens up to the end of the first `mark` that ends behind the first `scanned`."""
    for end in range(max(len(mark), scanned + 1), len(output_ids) + 1):
        if output_ids[end - len(mark) : end] == mark:
            return end
    return None
