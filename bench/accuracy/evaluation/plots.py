"""Pictures of accuracy by budget, by depth and by R."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import Cell, Results, progress, wilson

Bounds = tuple[float, float, float]
"""A share and its 95% interval: middle, low, high."""


def solved_bounds(results: Results, cell: Cell) -> Bounds:
    solved, of = results.solved(cell)
    return (solved / of, *wilson(solved, of))


def progress_bounds(results: Results, cell: Cell) -> Bounds:
    found = results.mean(cell, progress)
    return found.middle, found.middle - found.half, found.middle + found.half


MEASURES = {"solved": solved_bounds, "progress": progress_bounds}


def plot(results: Results, cells: Sequence[Cell], across: str, title: str, path: Path) -> None:
    """Both measures against `across`, "share" or "depth": a column a task, a line a method."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = Figure(figsize=(5 * len(tasks), 8), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    for row, (name, measure) in zip(panels, MEASURES.items(), strict=True):
        for axes, task in zip(row, tasks, strict=True):
            for method in dict.fromkeys(cell.method for cell in cells):
                own = [cell for cell in cells if (cell.task, cell.method) == (task, method)]
                found = {getattr(cell, across): measure(results, cell) for cell in own}
                if across == "share" and 0.0 in found:
                    axes.axhline(found[0.0][0], color="black", linestyle=":", label=method)
                else:
                    draw(axes, found, method)
            axes.set(title=task, ylim=(-0.02, 1.02))
        row[0].set_ylabel(name)
    for axes in panels[-1]:
        axes.set_xlabel("budget, share of the chain" if across == "share" else "depth")
        if across == "share":
            shares = sorted({cell.share for cell in cells if cell.share})
            axes.set_xscale("log")
            axes.set_xticks(shares, [f"{100 * share:.0f}%" for share in shares], minor=False)
            axes.minorticks_off()
    panels[0][0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


def plot_by_concentration(
    models: Mapping[float, Results], cells: Sequence[Cell], path: Path
) -> None:
    """One panel a task and budget, one line a method."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(cell.task for cell in cells))
    shares = sorted({cell.share for cell in cells if cell.share})
    size = (3 * len(shares), 3 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tasks), len(shares), squeeze=False, sharey=True)
    for row, task in zip(panels, tasks, strict=True):
        for axes, share in zip(row, shares, strict=True):
            for cell in cells:
                if cell.task == task and cell.share in (0.0, share):
                    draw(axes, {r: progress_bounds(models[r], cell) for r in models}, cell.method)
            axes.set(title=f"{task}, {100 * share:.0f}%", ylim=(-0.02, 1.02), xlabel="R")
    panels[0][0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def draw(axes: Any, found: Mapping[float, Bounds], label: str) -> None:
    """A line with intervals, by place."""
    places = sorted(found)
    middle = [found[place][0] for place in places]
    below = [found[place][0] - found[place][1] for place in places]
    above = [found[place][2] - found[place][0] for place in places]
    axes.errorbar(places, middle, [below, above], marker="o", capsize=2, label=label)
