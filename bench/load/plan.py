"""Which runs there are to be, and which of them there were not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bench.load.run import Run

Planned = Counter[tuple[str, str, str]]
"""How many runs there are to be of each pool, workload and arm."""


def left_out(planned: Planned, runs: Iterable[Run]) -> list[str]:
    """What is to be said about runs that are missing."""
    done = _done(runs)
    return [
        f"{workload}, pool {pool}, {arm}: {count - done[pool, workload, arm]} of {count} runs"
        for (pool, workload, arm), count in planned.items()
        if done[pool, workload, arm] < count
    ]


def all_measured(planned: Planned, runs: Iterable[Run]) -> bool:
    """Whether there is a run of everything, so that there is nothing that cannot be judged."""
    return set(planned) <= set(_done(runs))


def _done(runs: Iterable[Run]) -> Planned:
    return Counter((run.pool, run.workload, run.arm) for run in runs)
