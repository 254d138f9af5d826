"""Tables, JSON and the picture of the benchmark."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import pictures
from bench.goal import Goal
from bench.load.cells import Cell, Group
from bench.load.picture import draw
from bench.load.traffic import Traffic
from bench.machine import machine, versions
from bench.table import spread, table

_HEADER = [
    *("arm", "tokens/s", "ratio", "of repeats", "bytes allow", "of limit", "requests/s"),
    *("first token p50/95/99", "between tokens p50/95/99", "running", "peak slots"),
    *("cached", "retracted", "rounds"),
]
_NOTE = (
    "ratio: to production; of repeats: the lowest and the highest of one repeat; bytes allow: that "
    "ratio if steps only waited for weights and KV; of limit: tokens/s to what this machine's copy "
    "bandwidth allows; between tokens: SGLang's client spreads the time between two chunks over "
    "their tokens."
)


@dataclass(frozen=True)
class Results:
    """All that a bench has found.

    Attributes:
        command: how it was called.
        settings: of the bench, for the JSON.
        left_out: runs that there were not.
        failures: what went wrong.
        seconds: that it took.
    """

    command: str
    settings: dict[str, Any]
    traffic: Traffic
    groups: list[Group]
    goals: list[Goal]
    left_out: list[str]
    failures: list[str]
    seconds: float


def report(results: Results, output: Path) -> None:
    """Print tables and goals; write the JSON, and with matplotlib the picture beside it."""
    for group in results.groups:
        print(group_table(group), end="\n\n")
    print(_NOTE, *results.goals, sep="\n")
    print(*(f"left out: {text}" for text in results.left_out), *results.failures, sep="\n")
    result = {"machine": machine(), "versions": versions(), **asdict(results)}
    output.write_text(json.dumps(result, default=str))
    print(f"{results.seconds:.0f} s; written: {output}{_draw(results.groups, output)}")


def _draw(groups: list[Group], output: Path) -> str:
    """What is to be said about the picture."""
    if not groups:
        return ""
    if not pictures.available():
        return "; no picture: matplotlib cannot be imported"
    picture = output.with_suffix(".png")
    draw(groups).savefig(picture, dpi=110)
    return f", {picture}"


def group_table(group: Group) -> str:
    """One row for each arm of one workload in one pool."""
    run, best = group.production.first, group.best_stock
    attention = ", ".join(sorted({run.attention for cell in group.cells for run in cell.runs}))
    title = f"{run.workload}, pool {run.pool} ({run.slots} slots), attention: {attention}"
    factor = group.policy.ratio / best.ratio
    last = f"{group.policy.arm} to the best stock arm ({best.arm}): {factor:.2f} x"
    return "\n".join([title, table([_HEADER, *map(_row, group.cells)]), last])


def _row(cell: Cell) -> list[str]:
    return [
        cell.arm,
        spread([run.load.output_rate for run in cell.runs]),
        f"{cell.ratio:.2f}",
        f"{min(cell.ratios):.2f}-{max(cell.ratios):.2f}",
        f"{cell.allowed:.2f}",
        f"{cell.share:.1%}",
        f"{cell.median(lambda run: run.load.request_rate):.2f}",
        _times([run.load.first_token for run in cell.runs], 1, 2) + " s",
        _times([run.load.between_tokens for run in cell.runs], 1e3, 0) + " ms",
        f"{cell.median(lambda run: run.running):.1f}",
        str(max(run.peak_slots for run in cell.runs)),
        f"{cell.median(lambda run: run.load.cached):.0f}",
        f"{cell.median(lambda run: run.retracted):.0f}",
        f"{cell.median(lambda run: run.rounds):.0f}",
    ]


def _times(percentiles: list[tuple[float, ...]], unit: float, digits: int) -> str:
    """The medians of each percentile."""
    return "/".join(f"{unit * value:.{digits}f}" for value in np.median(percentiles, axis=0))
