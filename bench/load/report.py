"""Tables, JSON and the picture of the benchmark."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.goal import Goal
from bench.load.cells import Cell, best_clip
from bench.load.picture import draw
from bench.load.traffic import Traffic
from bench.machine import machine
from bench.table import table

_HEADER = [
    *("arm", "tokens/s", "ratio", "bytes allow", "requests/s", "first token p50/95/99"),
    *("between tokens p50/95/99", "running", "peak slots", "cached", "retracted", "rounds"),
]


def report(
    groups: list[list[Cell]],
    goals: list[Goal],
    traffic: Traffic,
    arguments: dict[str, Any],
    output: Path,
) -> None:
    """Print tables and goals; write the JSON, and the picture beside it."""
    for group in groups:
        print(group_table(group), end="\n\n")
    print(*goals, sep="\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "arguments": arguments,
        "traffic": asdict(traffic),
        "goals": [asdict(goal) for goal in goals],
        "groups": [[asdict(cell) for cell in group] for group in groups],
    }
    output.write_text(json.dumps(result, indent=1, default=str))
    picture = output.with_suffix(".png")
    draw(groups, picture)
    print(f"\nWritten: {output}, {picture}")


def group_table(group: list[Cell]) -> str:
    """One row for each arm of one workload in one pool."""
    run = group[0].first
    title = f"{run.workload}, pool {run.pool} ({run.slots} slots)"
    text = f"{title}\n{table([_HEADER, *map(_row, group)])}"
    best = best_clip(group)
    if best:
        policy = group[-1]
        factor = policy.ratio / best.ratio
        text += f"\n{policy.first.arm} to the best clip ({best.first.arm}): {factor:.2f} x"
    return text


def _row(cell: Cell) -> list[str]:
    rates = [run.output_rate for run in cell.runs]
    return [
        cell.first.arm,
        f"{cell.median(lambda run: run.output_rate):.0f} ({min(rates):.0f}-{max(rates):.0f})",
        f"{cell.ratio:.2f}",
        f"{cell.allowed:.2f}",
        f"{cell.median(lambda run: run.request_rate):.2f}",
        _times(cell, "first_token", 1, 2) + " s",
        _times(cell, "between_tokens", 1e3, 0) + " ms",
        f"{cell.median(lambda run: run.running):.1f}",
        str(max(run.peak_slots for run in cell.runs)),
        f"{cell.median(lambda run: run.cached):.0f}",
        f"{cell.median(lambda run: run.retracted):.0f}",
        f"{cell.median(lambda run: run.rounds):.0f}",
    ]


def _times(cell: Cell, name: str, unit: float, digits: int) -> str:
    """The medians of each percentile."""
    medians = np.median([getattr(run, name) for run in cell.runs], axis=0)
    return "/".join(f"{unit * value:.{digits}f}" for value in medians)
