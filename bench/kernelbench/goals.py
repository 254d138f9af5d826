"""What the kernels are to reach, and the arithmetic behind it."""

from __future__ import annotations

from collections.abc import Sequence

from bench.goal import Goal
from bench.kernelbench.cells import TWO_BUFFERS, Result
from bench.kernelbench.geometry import Cell

SCORE_PERCENT = 80.0
FROM_REQUESTS = 8
ROUND_PERCENT = 1.0
SPEEDUP = 10.0


def goals(results: Sequence[Result], copy: float, meaningful: bool) -> list[Goal]:
    """The worst cell decides.

    Args:
        copy: bytes per second of a device-to-device copy.
        meaningful: False on a CPU, whose times decide nothing.
    """
    return [
        _score_goal(results, copy, meaningful),
        _buffers_goal(results, meaningful),
        _round_goal(results, copy, meaningful),
        _speedup_goal(results, meaningful),
    ]


def step_ms(cell: Cell, copy: float) -> float:
    """What a decode step takes at least: the weights and all requests' kept KV are read once."""
    kv_bytes = cell.requests * cell.budget * cell.model.token_bytes
    return 1e3 * (cell.model.weight_bytes + kv_bytes) / copy


def round_percent(result: Result, copy: float) -> float:
    """Of decode time: each request has one round in `interval` steps."""
    return 100 * result.times.median / (result.cell.interval * step_ms(result.cell, copy))


def speedup(ours: Result, baseline: Result) -> float:
    return baseline.times.median / ours.times.median


def name(cell: Cell) -> str:
    return f"{cell.model.name}, requests {cell.requests}, n {cell.candidates}"


def arithmetic(result: Result, copy: float) -> str:
    """How `round_percent` comes about, in words."""
    cell, step = result.cell, step_ms(result.cell, copy)
    return (
        f"{name(cell)}: a step >= ({cell.model.weight_bytes / 1e9:.2f} GB of weights + "
        f"{cell.requests} x {cell.budget} x {cell.model.token_bytes} B of KV) / "
        f"{copy / 1e9:.1f} GB/s = {step:.3f} ms; {cell.interval} steps "
        f"{cell.interval * step:.2f} ms; one round of each request {result.times.median:.3f} ms, "
        f"{round_percent(result, copy):.3f}%"
    )


def _score_goal(results: Sequence[Result], copy: float, meaningful: bool) -> Goal:
    text = f"score reaches {SCORE_PERCENT:.0f}% of copy bandwidth from {FROM_REQUESTS} requests up"
    scores = [r for r in results if r.operation == "score" and r.cell.requests >= FROM_REQUESTS]
    if not scores:
        return Goal(text, f"no cell of {FROM_REQUESTS} requests or more", None, False)
    worst = min(scores, key=lambda result: result.percent_of(copy))
    percent = worst.percent_of(copy)
    met = percent >= SCORE_PERCENT if meaningful else None
    return Goal(text, f"{percent:.1f}% at worst ({name(worst.cell)})", met, False)


def _buffers_goal(results: Sequence[Result], meaningful: bool) -> Goal:
    """Whether the other way to score should become the product's."""
    text = f"{TWO_BUFFERS} is no slower than score"
    worst = _least_speedup(results, TWO_BUFFERS, "score")
    if worst is None:
        return Goal(text, "no cell", None, False)
    factor, cell = worst
    met = factor >= 1 if meaningful else None
    return Goal(text, f"{factor:.2f} times as fast at worst ({name(cell)})", met, False)


def _round_goal(results: Sequence[Result], copy: float, meaningful: bool) -> Goal:
    text = f"rounds take at most {ROUND_PERCENT:.0f}% of decode time"
    rounds = [result for result in results if result.operation == "round"]
    if not rounds:
        return Goal(text, "no cell", None, False)
    worst = max(rounds, key=lambda result: round_percent(result, copy))
    met = round_percent(worst, copy) <= ROUND_PERCENT if meaningful else None
    return Goal(text, f"at worst {arithmetic(worst, copy)}", met, False)


def _speedup_goal(results: Sequence[Result], meaningful: bool) -> Goal:
    text = f"a round is {SPEEDUP:.0f} times as fast as plain torch, or more"
    worst = _least_speedup(results, "round", "torch round")
    if worst is None:
        return Goal(text, "no cell", None, False)
    factor, cell = worst
    met = factor >= SPEEDUP if meaningful else None
    return Goal(text, f"{factor:.1f} times at worst ({name(cell)})", met, False)


def _least_speedup(
    results: Sequence[Result], ours: str, baseline: str
) -> tuple[float, Cell] | None:
    """Of operation `ours` over `baseline`, and where; None if no cell has both."""
    found = {result.cell: result for result in results if result.operation == ours}
    pairs = [
        (speedup(found[result.cell], result), result.cell)
        for result in results
        if result.operation == baseline and result.cell in found
    ]
    return min(pairs, key=lambda pair: pair[0], default=None)
