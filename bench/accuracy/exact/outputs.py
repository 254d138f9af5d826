"""Outputs are those of the model with the sets that were kept, and of no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.accuracy.client import Answer, Ask, Recorded, send, send_all
from bench.goal import Goal
from bench.server import Endpoint

from .judge import Judge, Limits, Verdict
from .parts import Result, need
from .questions import Questions
from .servers import BUDGET

TOKENS, TOGETHER = 250, 8
MODES = ("per-head", "per-layer-per-head", "per-head", "union")
# The control's error must be so many times the error with the recorded sets.
LEAST_FACTOR = 10.0
# And as many times the error with sets that the simulator has chosen itself.
UNTRACED_FACTOR = 5.0


References = tuple[list[Answer], Answer, list[Answer]]
"""What other servers have answered: stock SGLang to the requests that are sent alone, which is what
the dtype costs; one that evicts alike and records nothing to the first of them, and to those at
once.
"""


def ask_others(stock: Endpoint, huge: Endpoint, questions: Questions) -> References:
    huge.flush_cache()
    first, *batch = (
        replace(ask, policy={**ask.policy, "budget": BUDGET})
        for ask in [alone(questions)[0], *together(questions)]
    )
    untraced = send(huge, first), send_all(huge, batch)
    return [send(stock, ask) for ask in alone(questions)], *untraced


def alone(questions: Questions) -> list[Ask]:
    """One greedy, one sampled."""
    return [Ask(questions(n), TOKENS, temperature=float(n % 2)) for n in range(2)]


def together(questions: Questions) -> list[Ask]:
    """Half greedy, half sampled, in every eviction mode."""
    modes = [{"eviction_mode": MODES[n // 2 % len(MODES)]} for n in range(TOGETHER)]
    return [Ask(questions(2 + n), TOKENS, mode, float(n % 2)) for n, mode in enumerate(modes)]


def check(
    server: Endpoint,
    trace: Path,
    judge: Judge,
    questions: Questions,
    page_size: int,
    references: References | None = None,
) -> Result:
    """Judge some requests alone, then some at once.

    Args:
        trace: where the server writes its rounds.
        page_size: the server's.
        references: None where they could not be had.
    """
    server.flush_cache()
    answers = [send(server, ask) for ask in alone(questions)]
    answers += send_all(server, together(questions))
    verdicts = [
        judge.verdict(judge.conversation(one, page_size), one, Recorded.read(trace, one.rid))
        for one in answers
    ]
    if references is None:
        return Result(goals(verdicts, judge.limits), figures(verdicts))
    stock, untraced, batch = references
    floor = stated([judge.without_eviction(answer) for answer in stock])
    # Of eight at once that nothing holds up. Near ties, of which a coarse dtype has many, make the
    # simulator's sets others than the server's.
    own = stated([judge.with_own_sets(answer, page_size) for answer in batch])
    control = stated([judge.without_eviction(answer) for answer in batch])
    found = goals(verdicts, judge.limits, f"; stock SGLang's own {floor['mean']:.2e}")
    found.append(same_untraced(answers[0], untraced))
    text = "without a trace, errors without eviction are {} times those with the simulator's sets"
    found.append(far_off(text, control, own, UNTRACED_FACTOR))
    return Result(found, {**figures(verdicts), "floor": floor})


def same_untraced(traced: Answer, untraced: Answer) -> Goal:
    """Writing a trace makes the server wait, where it would otherwise run ahead."""
    alike = int((traced.logprobs == untraced.logprobs).sum())
    tokens, rounds = len(traced.logprobs), [traced.rounds, untraced.rounds]
    return need(
        "a server without a trace gives the same, bit for bit",
        f"{alike} of {tokens} log-probabilities, {rounds} rounds",
        traced.ids == untraced.ids and alike == tokens and rounds[0] == rounds[1],
    )


def far_off(
    text: str, control: dict[str, float], own: dict[str, float], least: float, note: str = ""
) -> Goal:
    """The control's mean error is at least so many times the other; `text` has a place for it."""
    # An error of 0 would be no wonder in a run that kept everything.
    factor = control["mean"] / max(own["mean"], 1e-12)
    measured = f"{control['mean']:.2e} and {own['mean']:.2e} nats, factor {factor:.0f}{note}"
    return need(text.format(f"{least:.0f}"), measured, factor >= least)


def goals(verdicts: Sequence[Verdict], limits: Limits, note: str = "") -> list[Goal]:
    """Those that every kind of output has; `note` is printed with the errors."""
    recorded = stated([one.recorded for one in verdicts])
    control = stated([one.control for one in verdicts])
    tolerance = max(one.tolerance for one in verdicts)
    otherwise, sets = sum(one.otherwise for one in verdicts), sum(one.sets for one in verdicts)
    rounds, agree = [one.rounds for one in verdicts], [one.agree for one in verdicts]
    where = f"{sum(agree)} of {len(agree)}"
    text = "errors judged without eviction are {} times those with recorded sets"
    most = f"errors with recorded sets are at most {limits.error} nats in the mean"
    near = f"other sets than the simulator's are near ties, {limits.tolerance} score units apart"
    few = f"there are at most {limits.otherwise:.0%} of them"
    return [
        far_off(text, control, recorded, LEAST_FACTOR, note),
        need(most, f"{recorded['mean']:.2e}", recorded["mean"] <= limits.error),
        need("every output was evicted from", f"rounds: {rounds}", min(rounds) > 0),
        need("rounds are where the simulator has them", where, all(agree)),
        need(near, f"{tolerance:.1e}", tolerance <= limits.tolerance),
        need(few, f"{otherwise} of {sets}", otherwise <= limits.otherwise * sets),
    ]


def figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Errors in nats, over all outputs and of each."""
    kinds = ("recorded", "control")
    every = {kind: stated([getattr(one, kind) for one in verdicts]) for kind in kinds}
    means = [{kind: float(getattr(one, kind).mean()) for kind in kinds} for one in verdicts]
    each = [{**asdict(one), **mean} for one, mean in zip(verdicts, means, strict=True)]
    return {**every, "of_each": each}


def stated(errors: Sequence[np.ndarray]) -> dict[str, float]:
    """Of all tokens, in nats."""
    joined = np.concatenate(errors)
    found = {"mean": joined.mean(), "p50": np.median(joined), "most": joined.max()}
    return {**{name: float(error) for name, error in found.items()}, "tokens": len(joined)}
