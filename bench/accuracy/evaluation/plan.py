"""Which cells are run, and with how many instances each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.accuracy.reference_model.evaluate import depths_of, instance
from bench.accuracy.reference_model.tokenizer import output_ids, prompt_ids

from .cells import Cell
from .methods import PUBLISHED, fits

SHARES = (0.03, 0.06, 0.12, 0.25, 0.5)
"""Budgets as shares of the mean output of a cell's instances."""
INTERVAL = 16
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


def common_depths(models: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Depths that models are compared at: of each task, place by place the least deep."""
    own = [depths_of(model) for model in models]
    return {
        task: tuple(map(min, zip(*(depths[task] for depths in own), strict=True)))
        for task in own[0]
    }


def hardest(model: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and right output of instances of each task, at the model's hardest depth in range."""
    depths = depths_of(model)
    made = [instance(task, own[-2], n) for task, own in depths.items() for n in range(count)]
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


def make_plan(
    methods: Iterable[str], tasks: Sequence[str], depths: Mapping[str, Sequence[int]]
) -> Plan:
    """depths: of each task, as of `depths_of`."""
    names = list(methods)
    budgets = [
        make_cell(method, task, depths[task][-2], share)
        for task in tasks
        for method in names
        for share in SHARES
    ]
    deeper = [
        make_cell(method, task, depth, AT)
        for task in tasks
        for method in names
        if method in PUBLISHED
        for depth in depths[task]
    ]
    return Plan(_possible(budgets), _possible(deeper))


def _possible(cells: list[Cell]) -> list[Cell]:
    """Each once, without budgets that are too small for the method: `-` in tables."""
    return [c for c in dict.fromkeys(cells) if not c.share or fits(c.method, c.budget, c.interval)]
