"""Accuracy as a function of R: models that differ in how concentrated their queries are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.table import table
from sglang_tri.statistics import describe, files

from .cells import Cell, Results
from .report import draw, far, progress_bounds
from .runner import Subject


def concentration_of(subject: Subject) -> float:
    """R over the three strongest frequency pairs, mean of all heads."""
    return describe.concentration(files.load(subject.stats)).strongest.mean().item()


def table_by_concentration(models: Mapping[float, Results], cells: Sequence[Cell]) -> str:
    """One row a cell, one column a model, by R."""
    ordered = sorted(models)
    rows = [["task", "budget", "method", *(f"R {r:.2f}" for r in ordered)]]
    for cell in sorted(cells, key=lambda cell: (cell.task, cell.share)):
        own = [far(models[r], cell) for r in ordered]
        rows.append([cell.task, f"{100 * cell.share:.0f}%", cell.method, *own])
    return table(rows)


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
