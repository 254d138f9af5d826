"""Tables and pictures of accuracy by method, budget and depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.table import table

from .cells import Cell, Results
from .served import Agreement


def percent(results: Results, cell: Cell | None) -> str:
    """Accuracy and its 95% interval in percent, e.g. `87.3 (84.9-89.4)`."""
    if cell is None or cell not in results.outcomes:
        return "-"
    tally = results.tally(cell)
    low, high = tally.interval
    return f"{100 * tally.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def accuracy_table(results: Results, cells: Sequence[Cell], across: str) -> str:
    """Methods down, `across` ("share" or "depth") to the right; full attention has no share."""
    columns = sorted({getattr(cell, across) for cell in cells if cell.share})
    by_place = {(cell.method, getattr(cell, across)): cell for cell in cells}
    titles = {cell.share: f"{100 * cell.share:.0f}% = {cell.budget}" for cell in cells}
    rows = [["", *(titles[c] if across == "share" else str(c) for c in columns)]]
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [by_place.get((method, column)) or by_place.get((method, 0.0)) for column in columns]
        rows.append([method, *(percent(results, cell) for cell in own)])
    return table(rows)


def difference_table(results: Results, cells: Sequence[Cell], base: str) -> str:
    """Points that methods solve more than `base` does, on the same questions at equal budgets.

    One row a method, one column a task and one for all; each with half of its 95% interval.
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
        found = [results.compare(own) if own else None for own in (*by_task, known)]
        shown = [f"{100 * d.middle:+.1f} ± {100 * d.half:.1f}" if d else "-" for d in found]
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


def plot(results: Results, cells: Sequence[Cell], across: str, title: str, path: Path) -> None:
    """Accuracy against `across`, "share" or "depth": one panel a task, one line a method."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = Figure(figsize=(5 * len(tasks), 4.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method in dict.fromkeys(cell.method for cell in cells):
            own = [cell for cell in cells if (cell.task, cell.method) == (task, method)]
            own.sort(key=lambda cell: getattr(cell, across))
            tallies = [results.tally(cell) for cell in own]
            middle = [tally.accuracy for tally in tallies]
            below = [m - tally.interval[0] for m, tally in zip(middle, tallies, strict=True)]
            above = [tally.interval[1] - m for m, tally in zip(middle, tallies, strict=True)]
            if across == "share" and own and own[0].share == 0:
                axes.axhline(middle[0], color="black", linestyle=":", label=method)
                continue
            places = [getattr(cell, across) for cell in own]
            axes.errorbar(places, middle, [below, above], marker="o", capsize=2, label=method)
        axes.set(title=task, ylim=(-0.02, 1.02))
        axes.set_xlabel("budget, share of the chain" if across == "share" else "depth")
        if across == "share":
            axes.set_xscale("log")
    figure.axes[0].set_ylabel("solved")
    figure.axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
