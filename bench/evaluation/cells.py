"""Cells: one method at one budget on one task at one depth; and what was found in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from .judge import Outcome

Z95 = 1.959964


@dataclass(frozen=True)
class Cell:
    """Budget and interval in tokens; `share` is the budget's of the mean chain, 0 for full."""

    method: str
    task: str
    depth: int
    share: float
    budget: int
    interval: int


@dataclass(frozen=True)
class Tally:
    """Outcomes of a cell's instances."""

    solved: int
    instances: int
    rounds: float
    """Mean number held in an instance."""

    @property
    def accuracy(self) -> float:
        return self.solved / self.instances

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95% (J. Am. Stat. Assoc. 22, 1927)."""
        n, share, z = self.instances, self.accuracy, Z95
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def instances_for(self, half: float) -> int:
        """Instances with which the interval is at most twice `half`, if the accuracy stays."""
        share = self.accuracy
        wanted = math.ceil(Z95 * Z95 * share * (1 - share) / (half * half))
        low, high = self.interval
        return self.instances if high - low <= 2 * half else max(wanted, self.instances + 8)


@dataclass(frozen=True)
class Difference:
    """How much better one method is than another on the same questions.

    Attributes:
        middle: accuracy of the one less that of the other.
        half: half of its 95% interval.
        questions: how many both have judged.
    """

    middle: float
    half: float
    questions: int


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

    def compare(self, pairs: Iterable[tuple[Cell, Cell]]) -> Difference:
        """One method's cells with another's; a question at several budgets counts once."""
        gains: dict[tuple[str, int, int], list[int]] = {}
        for one, other in pairs:
            theirs = self.outcomes[other]
            for number, own in self.outcomes[one].items():
                if number in theirs:
                    gain = own.solved - theirs[number].solved
                    gains.setdefault((one.task, one.depth, number), []).append(gain)
        means = [mean(own) for own in gains.values()]
        return Difference(mean(means), Z95 * stdev(means) / math.sqrt(len(means)), len(means))

    def tally(self, cell: Cell) -> Tally:
        outcomes = self.outcomes[cell].values()
        solved = sum(outcome.solved for outcome in outcomes)
        rounds = sum(outcome.rounds for outcome in outcomes) / len(outcomes)
        return Tally(solved, len(outcomes), rounds)
