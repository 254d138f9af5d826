"""The one runtime of a scheduler process."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_tri.aliases import AliasStore
    from sglang_tri.runtime import Runtime


@dataclass
class Active:
    """What the hooks share.

    Attributes:
        runtime: plans and runs rounds.
        scheduler: SGLang's.
        aliases: compressed history that can be found again.
        think_end: token ids that end a model's thinking, or none.
        statistics: file of the query statistics in use, or None.
        preempted: the requests that were preempted while the current batch was put together.
    """

    runtime: Runtime
    scheduler: Scheduler
    aliases: AliasStore
    think_end: array[int]
    statistics: str | None = None
    preempted: list[Req] = field(default_factory=list)


_active: Active | None = None


def activate(active: Active) -> None:
    global _active
    _active = active


def get() -> Active:
    """The active runtime; the hooks that call this are installed only together with one."""
    if _active is None:
        raise RuntimeError("the KV policy's hooks run, but its runtime was never built")
    return _active
