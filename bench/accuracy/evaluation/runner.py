"""Runs cells in the simulator, one process a core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.accuracy.reference_model.evaluate import instance
from bench.simulator import Oracle
from bench.simulator.stats import Stats
from sglang_tri.statistics import files

from .cells import Cell, Results
from .judge import Outcome, judge
from .methods import METHODS

TOGETHER = 8
"""Instances that a process is given at a time."""


@dataclass(frozen=True)
class Subject:
    """A model folder and its statistics file."""

    model: Path
    stats: Path


@cache
def load(subject: Subject) -> Oracle:
    """The model with its statistics; ours have second moments, which official files lack."""
    oracle = Oracle(subject.model)
    found = files.load(subject.stats)
    square = None if found.q_square is None else found.q_square.double()
    oracle.stats = Stats(found.q_mean.to(torch.complex128), found.q_abs.double(), square)
    return oracle


def run(
    subject: Subject,
    cells: Sequence[tuple[Cell, int]],
    results: Results,
    processes: int,
    on_outcome: Callable[[Cell, Outcome], object],
) -> None:
    """Fill `results` with as many instances of each cell as are asked for and not there yet."""
    work = [
        (cell, numbers[begin : begin + TOGETHER])
        for cell, count in cells
        for numbers in [list(results.missing(cell, range(count)))]
        for begin in range(0, len(numbers), TOGETHER)
    ]
    if not work:
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        jobs = pool.map(judge_all, *zip(*((subject, *job) for job in work), strict=True))
        for (cell, numbers), outcomes in zip(work, jobs, strict=True):
            for number, outcome in zip(numbers, outcomes, strict=True):
                results.add(cell, number, outcome)
                on_outcome(cell, outcome)


def judge_all(subject: Subject, cell: Cell, numbers: Sequence[int]) -> list[Outcome]:
    """Outcomes of instances of one cell, in this process."""
    oracle, policy = load(subject), METHODS[cell.method](cell.budget, cell.interval)
    return [judge(oracle, policy, instance(cell.task, cell.depth, n)) for n in numbers]
