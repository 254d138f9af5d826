"""Accuracy as a function of R: models that differ in how concentrated their queries are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.table import table
from sglang_tri.statistics import describe, files

from .cells import Cell, Results
from .runner import Subject
from .tables import far


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
