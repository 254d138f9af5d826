"""Tables, JSON and the picture of what was measured with agents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.agent.arms import Outcome
from bench.agent.calls import Call
from bench.goal import Goal
from bench.machine import machine
from bench.table import table


def report(
    outcomes: list[Outcome], goals: list[Goal], arguments: dict[str, Any], output: Path
) -> None:
    """Print the tables and the goals; write the JSON, and the picture beside it."""
    print(arm_table(outcomes), turn_table(outcomes), *map(str, goals), sep="\n\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "arguments": arguments,
        "goals": [asdict(goal) for goal in goals],
        "arms": [outcome.to_dict() for outcome in outcomes],
    }
    output.write_text(json.dumps(result, indent=1, default=str))
    draw(outcomes, output.with_suffix(".png"))
    print(f"\nWritten: {output}, {output.with_suffix('.png')}")


def arm_table(outcomes: list[Outcome]) -> str:
    """One row for each arm."""
    paths = _paths(outcomes)
    header = ["arm", "tokens/s", "peak slots", "rounds", "evicted", "cached", "prefilled"]
    rows = [[*header, *(f"hits {path}" for path in paths)]]
    for outcome in outcomes:
        peak = "n/a" if outcome.peak_slots is None else str(outcome.peak_slots)
        counters = [str(outcome.policy.get(name, "")) for name in ("rounds", "evicted_tokens")]
        speed = f"{outcome.tokens_per_second:.0f}"
        counts = _counts(outcome.calls)
        rows.append([outcome.name, speed, peak, *counters, *counts, *_rates(outcome.calls, paths)])
    return table(rows)


def turn_table(outcomes: list[Outcome]) -> str:
    """One row for each kind of request in each turn of each arm."""
    paths = _paths(outcomes)
    header = ["arm", "turn", "request", "first token p50", "p95", "cached", "prefilled", "new"]
    rows = [[*header, *(f"hits {path}" for path in paths)]]
    for outcome in outcomes:
        for turn, kind in _steps(outcome.calls):
            calls = _step(outcome.calls, turn, kind)
            times = [f"{1e3 * second:.0f} ms" for second in _percentiles(calls)]
            new = str(sum(call.new for call in calls))
            counts = [*_counts(calls), new]
            rows.append([outcome.name, str(turn), kind, *times, *counts, *_rates(calls, paths)])
    return table(rows)


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Time to first token by turn and request: a line for each arm, up to p95 in a lighter tone."""
    figure = Figure(figsize=(9, 5), layout="tight")
    axes = figure.subplots()
    for outcome in outcomes:
        steps = _steps(outcome.calls)
        times = [_percentiles(_step(outcome.calls, turn, kind)) for turn, kind in steps]
        labels = [f"{turn}\n{kind}" for turn, kind in steps]
        medians, highs = zip(*times, strict=True)
        (line,) = axes.plot(labels, medians, marker="o", label=outcome.name)
        axes.fill_between(labels, medians, highs, alpha=0.2, color=line.get_color())
    axes.set(xlabel="turn", ylabel="time to first token, s", ylim=(0, None))
    axes.set_title("Time to first token by turn: p50 (line) to p95 (shade)")
    axes.legend()
    figure.savefig(path, dpi=120)


def _paths(outcomes: list[Outcome]) -> list[str]:
    return list(dict.fromkeys(call.path for outcome in outcomes for call in outcome.calls))


def _steps(calls: Iterable[Call]) -> list[tuple[int, str]]:
    """Turn and kind of all requests, in order."""
    return list(dict.fromkeys((call.turn, call.kind) for call in calls))


def _step(calls: Iterable[Call], turn: int, kind: str) -> list[Call]:
    return [call for call in calls if (call.turn, call.kind) == (turn, kind)]


def _percentiles(calls: Sequence[Call]) -> tuple[float, float]:
    """p50 and p95 of the time to first token, in seconds."""
    p50, p95 = np.percentile([call.first_token_s for call in calls], [50, 95])
    return float(p50), float(p95)


def _counts(calls: Sequence[Call]) -> list[str]:
    return [str(sum(call.cached for call in calls)), str(sum(call.prefilled for call in calls))]


def _rates(calls: Sequence[Call], paths: list[str]) -> list[str]:
    """Cached share of the prompts' tokens on each path."""
    rates = []
    for path in paths:
        mine = [call for call in calls if call.path == path]
        rates.append(f"{sum(c.cached for c in mine) / sum(c.prompt for c in mine):.1%}")
    return rates
