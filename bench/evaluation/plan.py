"""Which cells are run, and with how many instances each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.reference_model.evaluate import IN_RANGE, instance
from bench.reference_model.tokenizer import output_ids, prompt_ids

from .cells import Cell
from .methods import PUBLISHED, fits

SHARES = (0.03, 0.06, 0.12, 0.25, 0.5)
"""Budgets as shares of the mean output of a cell's instances."""
INTERVAL = 16
DEPTHS = {task: (last // 3, 2 * last // 3, last) for task, last in IN_RANGE.items()}
"""Depths in range, easy to hardest."""
BEYOND = {"tree": (18,), "registers": (48,), "variables": (72,)}
"""Deeper than any that was trained."""
AT = 0.5
"""Share of the chain at which depths are compared."""
_SAMPLE = 20


@dataclass(frozen=True)
class Plan:
    """Cells of one study, by what they vary."""

    budgets: list[Cell]
    """Methods by budget, at the hardest depth in range."""
    depths: list[Cell]
    """Published methods by depth, at one share of the chain."""

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys([*self.budgets, *self.depths]))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def decisive(self) -> list[Cell]:
        """Where published methods are compared: the hardest depth in range at the share `AT`."""
        return [c for c in self.budgets if c.method in PUBLISHED and c.share in (0.0, AT)]


def hardest(count: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and right output of instances of each task, at its hardest depth in range."""
    made = [instance(t, depths[-1], n) for t, depths in DEPTHS.items() for n in range(count)]
    return [(prompt_ids(one.question), output_ids(one)) for one in made]


def mean_output(task: str, depth: int) -> float:
    """Tokens of a right output, over some instances."""
    sizes = [len(output_ids(instance(task, depth, number))) for number in range(_SAMPLE)]
    return statistics.mean(sizes)


def make_cell(method: str, task: str, depth: int, share: float, interval: int = INTERVAL) -> Cell:
    """The budget is that share of the cell's mean output; full attention has none."""
    if method == "full":
        return Cell(method, task, depth, 0.0, 0, 0)
    budget = round(share * mean_output(task, depth))
    return Cell(method, task, depth, share, budget, interval)


def make_plan(methods: Iterable[str], tasks: Sequence[str]) -> Plan:
    names = list(methods)
    budgets = [
        make_cell(method, task, DEPTHS[task][-1], share)
        for task in tasks
        for method in names
        for share in SHARES
    ]
    depths = [
        make_cell(method, task, depth, AT)
        for task in tasks
        for method in names
        if method in PUBLISHED
        for depth in (*DEPTHS[task], *BEYOND[task])
    ]
    return Plan(_possible(budgets), _possible(depths))


def _possible(cells: list[Cell]) -> list[Cell]:
    """Each once, without budgets that are too small for the method: `-` in tables."""
    return [c for c in dict.fromkeys(cells) if not c.share or fits(c.method, c.budget, c.interval)]
