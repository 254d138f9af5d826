"""What the benchmark is to show."""

from __future__ import annotations

from bench.goal import Goal
from bench.load.arms import POLICY
from bench.load.cells import Cell
from bench.load.presets import RICH
from bench.load.workloads import REASONING

RICH_RATIO, OF_ALLOWED = 0.98, 0.8
AS_MANY = 0.99  # Whose questions begin alike by chance depends on who came first.


def judge(groups: list[list[Cell]], least: float) -> list[Goal]:
    """All goals, for each workload in each pool; groups as from `cells`.

    Args:
        least: ratio to production SGLang that reasoning is to reach where memory is short.
    """
    goals = []
    for group in groups:
        stock = group[0]
        policy = next(cell for cell in group if cell.first.arm == POLICY)
        where = f"{policy.first.workload}, pool {policy.first.pool}"
        reasons = policy.first.workload.startswith(REASONING)
        if policy.first.pool == RICH:
            goals.append(_faster(where, policy, RICH_RATIO))
        elif reasons:
            goals += [_faster(where, policy, least), _as_bytes_allow(where, policy)]
        if reasons:
            goals.append(_cached(where, policy, stock))
    return goals


def _faster(where: str, policy: Cell, least: float) -> Goal:
    text = f"{where}: output tokens/s >= {least} x production's"
    return Goal(text, f"{policy.ratio:.2f} x", policy.ratio >= least, False)


def _as_bytes_allow(where: str, policy: Cell) -> Goal:
    share = policy.ratio / policy.allowed
    text = f"{where}: ratio >= {OF_ALLOWED:.0%} of what bytes allow"
    return Goal(text, f"{share:.0%} of {policy.allowed:.2f} x", share >= OF_ALLOWED, False)


def _cached(where: str, policy: Cell, stock: Cell) -> Goal:
    ours, theirs = (cell.median(lambda run: run.cached) for cell in (policy, stock))
    text = f"{where}: at least as many prompt tokens cached as in production"
    return Goal(text, f"{ours:.0f}, production {theirs:.0f}", ours >= AS_MANY * theirs, True)
