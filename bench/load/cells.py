"""Medians of the runs of one workload on one arm in one pool, beside production SGLang's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from bench.load.arms import CLIPPED, PRODUCTION
from bench.load.run import Run
from bench.load.traffic import Traffic


@dataclass(frozen=True)
class Cell:
    """All runs of one arm.

    Attributes:
        ratio: its output tokens/s to production SGLang's.
        allowed: what that would be if both only waited for bytes.
    """

    runs: list[Run]
    ratio: float
    allowed: float

    @property
    def first(self) -> Run:
        return self.runs[0]

    def median(self, figure: Callable[[Run], float]) -> float:
        return median(map(figure, self.runs))


def cells(runs: Iterable[Run], traffic: Traffic) -> list[list[Cell]]:
    """The cells of each workload in each pool, in the order of the runs; production's first."""
    groups: dict[tuple[str, str, int], dict[str, list[Run]]] = {}
    for run in runs:
        group = groups.setdefault((run.workload, run.pool, run.slots), {})
        group.setdefault(run.arm, []).append(run)
    return [_compare(group, traffic) for group in groups.values()]


def best_clip(group: list[Cell]) -> Cell | None:
    """The fastest arm with an estimate of its own; None if there is none."""
    clipped = [cell for cell in group if cell.first.arm.startswith(CLIPPED)]
    return max(clipped, key=lambda cell: cell.ratio, default=None)


def _compare(group: dict[str, list[Run]], traffic: Traffic) -> list[Cell]:
    def speed(runs: list[Run]) -> float:
        return median(run.output_rate for run in runs)

    def allowed(runs: list[Run]) -> float:
        running, read = (fmean(getattr(run, name) for run in runs) for name in ("running", "read"))
        return traffic.tokens_per_second(running, read)

    stock = group[PRODUCTION]
    return [
        Cell(runs, speed(runs) / speed(stock), allowed(runs) / allowed(stock))
        for _, runs in sorted(group.items(), key=lambda item: item[0] != PRODUCTION)
    ]
