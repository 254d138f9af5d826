"""The one runtime of a scheduler process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_tri.runtime import Runtime


@dataclass
class Active:
    runtime: Runtime
    scheduler: Scheduler


_active: Active | None = None


def activate(active: Active) -> None:
    global _active
    _active = active


def get() -> Active:
    """The active runtime; the hooks that call this are installed only together with one."""
    if _active is None:
        raise RuntimeError("the KV policy's hooks run, but its runtime was never built")
    return _active
