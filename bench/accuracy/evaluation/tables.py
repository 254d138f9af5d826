"""Tables of accuracy by method, budget and depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from bench.table import table

from .cells import Cell, Mean, Results, progress, wilson
from .served import Agreement

Shown = Callable[[Results, Cell | None], str]
"""How a cell is written."""


def percent(results: Results, cell: Cell | None) -> str:
    """Accuracy and its 95% interval in percent, e.g. `87.3 (84.9-89.4)`."""
    if cell is None or cell not in results.outcomes:
        return "-"
    solved, of = results.solved(cell)
    low, high = wilson(solved, of)
    return f"{100 * solved / of:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def far(results: Results, cell: Cell | None) -> str:
    """Mean progress and half of its 95% interval in percent, e.g. `87.3 ± 2.4`."""
    if cell is None or cell not in results.outcomes:
        return "-"
    return _plus_minus(results.mean(cell, progress))


def _plus_minus(found: Mean, sign: str = "") -> str:
    return f"{100 * found.middle:{sign}.1f} ± {100 * found.half:.1f}"


def accuracy_table(results: Results, cells: Sequence[Cell], across: str, shown: Shown) -> str:
    """Methods down, `across` ("share" or "depth") to the right; full attention has no share."""
    columns = sorted({getattr(cell, across) for cell in cells if cell.share})
    by_place = {(cell.method, getattr(cell, across)): cell for cell in cells}
    titles = {cell.share: f"{100 * cell.share:.0f}% = {cell.budget}" for cell in cells}
    rows = [["", *(titles[c] if across == "share" else str(c) for c in columns)]]
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [by_place.get((method, column)) or by_place.get((method, 0.0)) for column in columns]
        rows.append([method, *(shown(results, cell) for cell in own)])
    return table(rows)


def overall_table(results: Results, cells: Sequence[Cell]) -> str:
    """Progress as a mean over tasks, methods down, budgets to the right."""
    shares = sorted({cell.share for cell in cells if cell.share})
    tasks = {cell.task for cell in cells}
    rows = [["", *(f"{100 * share:.0f}%" for share in shares)]]
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        rows.append([method])
        for share in shares:
            found = [results.mean(c, progress) for c in own if c.share in (0.0, share)]
            # Not all tasks have a budget that is large enough for every method.
            rows[-1].append(_over_tasks(found) if len(found) == len(tasks) else "-")
    return table(rows)


def _over_tasks(found: Sequence[Mean]) -> str:
    middle = mean(one.middle for one in found)
    half = math.sqrt(sum(one.half**2 for one in found)) / len(found)
    return f"{100 * middle:.1f} ± {100 * half:.1f}"


def difference_table(results: Results, cells: Sequence[Cell], base: str) -> str:
    """By how many points of progress methods are ahead of `base`, on the same questions.

    Over all budgets that both have. One row a method, one column a task and one for all; each with
    half of its 95% interval.
    """
    bases = {(cell.task, cell.share): cell for cell in cells if cell.method == base}
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    rows = [["", *tasks, "all", "questions"]]
    for method in dict.fromkeys(cell.method for cell in cells):
        pairs = [(c, bases.get((c.task, c.share))) for c in cells if c.method == method]
        known = [(one, other) for one, other in pairs if other is not None]
        if method == base or not known:
            continue
        by_task = [[pair for pair in known if pair[0].task == task] for task in tasks]
        found = [results.compare(own, progress) if own else None for own in (*by_task, known)]
        shown = [_plus_minus(one, "+") if one else "-" for one in found]
        rows.append([method, *shown, str(found[-1].questions if found[-1] else 0)])
    return table(rows)


def agreement_table(agreements: Iterable[Agreement]) -> str:
    rows = [["cell", "instances", "server", "simulator", "alike", "rounds", "evicted"]]
    for one in agreements:
        cell = one.cell
        name = f"{cell.method}, {cell.task} {cell.depth}, {cell.budget} tokens"
        numbers = (one.instances, *one.solved, one.alike, one.rounds, one.evicted)
        rows.append([name, *(str(number) for number in numbers)])
    return table(rows)
