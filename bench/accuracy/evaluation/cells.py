"""Cells: one method at one budget on one task at one depth; and what was found in them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import binomtest, norm

from .judge import Outcome

Z95 = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Cell:
    """Budget and interval in tokens; `share` is the budget's of the mean chain, 0 for full."""

    method: str
    task: str
    depth: int
    share: float
    budget: int
    interval: int


def wilson(solved: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of a share at 95%: low, high."""
    low, high = binomtest(solved, of).proportion_ci(method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Mean:
    """Of a quantity over questions; `deviation` is theirs, `half` half of the 95% interval."""

    middle: float
    deviation: float
    questions: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(mean(values), stdev(values), len(values))

    @property
    def half(self) -> float:
        return Z95 * self.deviation / math.sqrt(self.questions)

    def questions_for(self, half: float) -> int:
        """With how many the interval is that narrow, if the deviation stays."""
        return math.ceil((Z95 * self.deviation / half) ** 2)


Measure = Callable[[Outcome], float]
"""What is compared of outcomes."""


def progress(outcome: Outcome) -> float:
    return outcome.progress


def solved(outcome: Outcome) -> float:
    return float(outcome.solved)


class Results:
    """Outcomes by cell and instance, in a file that grows: a run goes on where it ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Cell, dict[int, Outcome]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                content = json.loads(line)
                cell = Cell(**content["cell"])
                outcomes = self.outcomes.setdefault(cell, {})
                outcomes[content["instance"]] = Outcome(**content["outcome"])

    def missing(self, cell: Cell, instances: Iterable[int]) -> Iterator[int]:
        known = self.outcomes.get(cell, {})
        return (number for number in instances if number not in known)

    def add(self, cell: Cell, instance: int, outcome: Outcome) -> None:
        self.outcomes.setdefault(cell, {})[instance] = outcome
        content = {"cell": asdict(cell), "instance": instance, "outcome": asdict(outcome)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    def instances_for(self, cell: Cell, half: float) -> int:
        """Instances with which intervals are no wider than `half` to either side, as it looks."""
        found = (self.mean(cell, measure) for measure in (solved, progress))
        return max(one.questions_for(half) for one in found)

    def mean(self, cell: Cell, measure: Measure) -> Mean:
        return Mean.of([measure(outcome) for outcome in self.outcomes[cell].values()])

    def compare(self, pairs: Iterable[tuple[Cell, Cell]], measure: Measure) -> Mean:
        """One method's cells less another's, over the questions that have all of the pairs.

        A question at several budgets counts once.
        """
        gains: dict[tuple[str, int, int], list[float]] = {}
        for one, other in pairs:
            theirs = self.outcomes[other]
            for number, own in self.outcomes[one].items():
                if number in theirs:
                    gain = measure(own) - measure(theirs[number])
                    gains.setdefault((one.task, one.depth, number), []).append(gain)
        whole = Counter[str]()
        for (task, *_), gained in gains.items():
            whole[task] = max(whole[task], len(gained))
        return Mean.of([mean(own) for (t, *_), own in gains.items() if len(own) == whole[t]])

    def solved(self, cell: Cell) -> tuple[int, int]:
        """How many of how many instances."""
        outcomes = self.outcomes[cell].values()
        return sum(outcome.solved for outcome in outcomes), len(outcomes)
