"""Medians of the runs of one workload on one arm in one pool, beside production SGLang's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from bench.load.arms import CLIPPED, POLICY, PRODUCTION
from bench.load.run import Run
from bench.load.traffic import Traffic


@dataclass(frozen=True)
class Cell:
    """All runs of one arm.

    Attributes:
        ratio: its output tokens/s to production SGLang's.
        ratios: the same of each repeat, whose arms ran one after another.
        limit: output tokens/s if a step only waited for its bytes.
        allowed: that limit to production SGLang's.
    """

    runs: list[Run]
    ratio: float
    ratios: list[float]
    limit: float
    allowed: float

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def arm(self) -> str:
        return self.first.arm

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.median(lambda run: run.load.output_rate)

    @property
    def share(self) -> float:
        """Of its limit."""
        return self.rate / self.limit

    def median(self, figure: Callable[[Run], float]) -> float:
        return median(map(figure, self.runs))


@dataclass(frozen=True)
class Group:
    """The arms of one workload in one pool, production first, the policy last."""

    cells: list[Cell]

    @property
    def production(self) -> Cell:
        return self.cells[0]

    @property
    def policy(self) -> Cell:
        return self.cells[-1]

    @property
    def best_stock(self) -> Cell:
        """The fastest of production SGLang, whatever its estimate of output lengths."""
        stock = (c for c in self.cells if c.arm == PRODUCTION or c.arm.startswith(CLIPPED))
        return max(stock, key=lambda cell: cell.ratio)


def group(runs: Iterable[Run], traffic: Traffic) -> list[Group]:
    """The groups that are complete, in the order of the runs."""
    found: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        arms = found.setdefault((run.workload, run.pool), {})
        arms.setdefault(run.arm, []).append(run)
    complete = (arms for arms in found.values() if {PRODUCTION, POLICY} <= set(arms))
    return [_compare(arms, traffic) for arms in complete]


def _compare(arms: dict[str, list[Run]], traffic: Traffic) -> Group:
    def rate(runs: list[Run]) -> float:
        return median(run.load.output_rate for run in runs)

    def limit(runs: list[Run]) -> float:
        running, read = (fmean(getattr(run, name) for run in runs) for name in ("running", "read"))
        return traffic.tokens_per_second(running, read)

    def ratios(runs: list[Run]) -> list[float]:
        pairs = zip(runs, stock, strict=False)  # The last repeat may not have come to its end.
        return [run.load.output_rate / other.load.output_rate for run, other in pairs]

    stock = arms[PRODUCTION]
    ordered = sorted(arms, key=lambda arm: (arm == POLICY) - (arm == PRODUCTION))
    return Group(
        [
            Cell(
                runs,
                rate(runs) / rate(stock),
                ratios(runs),
                limit(runs),
                limit(runs) / limit(stock),
            )
            for runs in map(arms.__getitem__, ordered)
        ]
    )
