"""What the benchmark is to show."""

from __future__ import annotations

from dataclasses import replace

from bench.goal import Goal
from bench.load.cells import Group
from bench.load.presets import RICH
from bench.load.workloads import NEVER, REASONING

RICH_RATIO, NEVER_RATIO, OF_ALLOWED = 0.98, 0.99, 0.8
BOUND = 0.5  # Share of its limit from which on a server counts as bound by bytes.
AS_MANY = 0.99  # Whose questions begin alike by chance depends on who came first.


def judge(groups: list[Group], least: float) -> list[Goal]:
    """All goals, for each workload in each pool.

    Args:
        least: ratio to production SGLang that reasoning is to reach where memory is short.
    """
    goals = []
    for group in groups:
        run = group.policy.first
        reasons = run.workload.startswith(REASONING)
        if run.workload.startswith(NEVER):
            goals += _untouched(group)
        elif run.pool == RICH:
            goals.append(_faster(group, RICH_RATIO))
        elif reasons:
            goals += [_faster(group, least), _as_bytes_allow(group)]
        if reasons:
            goals.append(_cached(group))
    return goals


def _where(group: Group) -> str:
    return f"{group.policy.first.workload}, pool {group.policy.first.pool}"


def _faster(group: Group, least: float) -> Goal:
    text = f"{_where(group)}: output tokens/s >= {least} x production's"
    return Goal(text, f"{group.policy.ratio:.2f} x", group.policy.ratio >= least, False)


def _untouched(group: Group) -> list[Goal]:
    """A round makes the speed meaningless: it is not that of a server that never evicts."""
    rounds = sum(run.rounds for run in group.policy.runs)
    none = Goal(f"{_where(group)}: no round", f"{rounds} rounds", not rounds, True)
    speed = _faster(group, NEVER_RATIO)
    return [none, replace(speed, met=None) if rounds else speed]


def _as_bytes_allow(group: Group) -> Goal:
    text = f"{_where(group)}: ratio >= {OF_ALLOWED:.0%} of what bytes allow"
    policy, production = group.policy, group.production
    if production.share < BOUND:
        measured = f"bytes do not bind: production runs at {production.share:.1%} of their limit"
        return Goal(text, measured, None, False)
    share = policy.ratio / policy.allowed
    return Goal(text, f"{share:.0%} of {policy.allowed:.2f} x", share >= OF_ALLOWED, False)


def _cached(group: Group) -> Goal:
    ours, theirs = (
        cell.median(lambda run: run.load.cached) for cell in (group.policy, group.production)
    )
    text = f"{_where(group)}: as many prompt tokens cached as in production"
    return Goal(text, f"{ours:.0f}, production {theirs:.0f}", ours >= AS_MANY * theirs, True)
