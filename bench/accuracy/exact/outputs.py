"""Outputs are those of the model with the sets that were kept, and of no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.goal import Goal
from bench.server import Endpoint

from .client import Answer, Ask, send, send_all
from .judge import Judge, Recorded, Verdict
from .questions import Questions
from .results import Result, need
from .servers import BUDGET

TOKENS, TOGETHER = 250, 8
MODES = ("per-head", "per-layer-per-head", "per-head", "union")
# The control's error must be so many times the error with the recorded sets.
LEAST_FACTOR = 10.0
# And as many times the error with sets that the simulator has chosen itself.
UNTRACED_FACTOR = 5.0


@dataclass(frozen=True)
class Limits:
    """What a dtype allows.

    Attributes:
        error: mean |difference| of log-probabilities, in nats.
        near: score units within which a near tie is to be expected; scores are of order 1.
        tolerance: score units within which the server may choose otherwise than the simulator.
        otherwise: share of sets that it may choose otherwise.
    """

    error: float
    near: float
    tolerance: float
    otherwise: float

    @classmethod
    def of(cls, dtype: str) -> Limits:
        # Positions that are off by one cost 0.055 nats in bfloat16, its rounding 0.005.
        return cls(1e-4, 1e-5, 1e-4, 0.05) if dtype == "float32" else cls(0.03, 1e-2, 0.25, 0.4)


@dataclass(frozen=True)
class References:
    """What other servers have answered to the requests that are sent alone.

    Attributes:
        floors: stock SGLang; what the dtype costs.
        untraced: a server that evicts alike and records nothing, to the first of them.
        batch: the same server, to the requests that are sent at once.
    """

    floors: list[Answer]
    untraced: Answer
    batch: list[Answer]

    @classmethod
    def ask(cls, stock: Endpoint, huge: Endpoint, questions: Questions) -> References:
        asks = alone(questions)
        huge.flush_cache()
        untraced = send(huge, replace(asks[0], budget=BUDGET))
        batch = send_all(huge, [replace(ask, budget=BUDGET) for ask in together(questions)])
        return cls([send(stock, ask) for ask in asks], untraced, batch)


def alone(questions: Questions) -> list[Ask]:
    return [Ask(questions(number), TOKENS, float(number % 2)) for number in range(2)]


def together(questions: Questions) -> list[Ask]:
    """Half greedy, half sampled, in every eviction mode."""
    return [
        Ask(questions(2 + n), TOKENS, float(n % 2), MODES[n // 2 % len(MODES)])
        for n in range(TOGETHER)
    ]


def check(
    server: Endpoint,
    trace: Path,
    references: References | None,
    judge: Judge,
    questions: Questions,
    page_size: int,
    limits: Limits,
) -> Result:
    """Judge some requests alone, then some at once.

    Args:
        trace: where the server writes its rounds.
        references: None where they could not be had.
    """
    server.flush_cache()
    answers = [send(server, ask) for ask in alone(questions)]
    answers += send_all(server, together(questions))
    verdicts = [
        judge.verdict(
            judge.conversation(answer.ask.mode, page_size),
            answer,
            Recorded.read(trace, answer.rid),
        )
        for answer in answers
    ]
    if references is None:
        return Result(goals(verdicts, limits), figures(verdicts))
    floor = stated([judge.without_eviction(answer) for answer in references.floors])
    found = goals(verdicts, limits, f"; stock SGLang's own {floor['mean']:.2e}")
    found.append(same_untraced(answers[0], references.untraced))
    untraced = goal_untraced(
        stated([judge.with_own_sets(answer, page_size) for answer in references.batch]),
        stated([judge.without_eviction(answer) for answer in references.batch]),
    )
    return Result([*found, untraced], {**figures(verdicts), "floor": floor})


def goal_untraced(own: dict[str, float], control: dict[str, float]) -> Goal:
    """Of eight at once that nothing holds up.

    Near ties, of which a coarse dtype has many, make the simulator's sets others than the server's.
    """
    factor = control["mean"] / max(own["mean"], 1e-12)
    return need(
        f"without a trace, errors without eviction are {UNTRACED_FACTOR:.0f} times those with the "
        "simulator's sets",
        f"{control['mean']:.2e} and {own['mean']:.2e} nats, factor {factor:.0f}",
        factor >= UNTRACED_FACTOR,
    )


def same_untraced(traced: Answer, untraced: Answer) -> Goal:
    """Writing a trace makes the server wait, where it would otherwise run ahead."""
    pairs = list(zip(traced.logprobs, untraced.logprobs, strict=True))
    alike = sum(one == other for one, other in pairs)
    return need(
        "a server without a trace gives the same, bit for bit",
        f"{alike} of {len(pairs)} log-probabilities, {traced.rounds} and {untraced.rounds} rounds",
        traced.ids == untraced.ids and alike == len(pairs) and traced.rounds == untraced.rounds,
    )


def goals(verdicts: Sequence[Verdict], limits: Limits, note: str = "") -> list[Goal]:
    """Those that every kind of output has; `note` is printed with the errors."""
    recorded, control = (
        stated([getattr(one, name) for one in verdicts])["mean"] for name in ("recorded", "control")
    )
    # An error of 0 would be no wonder in a run that kept everything.
    factor = control / max(recorded, 1e-12)
    tolerance = max(one.tolerance for one in verdicts)
    otherwise, sets = (
        sum(getattr(one, name) for one in verdicts) for name in ("otherwise", "sets")
    )
    rounds, agree = [one.rounds for one in verdicts], [one.agree for one in verdicts]
    return [
        need(
            f"errors judged without eviction are {LEAST_FACTOR:.0f} times those with recorded sets",
            f"{control:.2e} and {recorded:.2e} nats, factor {factor:.0f}{note}",
            factor >= LEAST_FACTOR,
        ),
        need(
            f"errors with recorded sets are at most {limits.error} nats in the mean",
            f"{recorded:.2e}",
            recorded <= limits.error,
        ),
        need("every output was evicted from", f"rounds: {rounds}", min(rounds) > 0),
        need(
            "rounds are where the simulator has them", f"{sum(agree)} of {len(agree)}", all(agree)
        ),
        need(
            f"other sets than the simulator's are near ties, {limits.tolerance} score units apart",
            f"{tolerance:.1e}",
            tolerance <= limits.tolerance,
        ),
        need(
            f"there are at most {limits.otherwise:.0%} of them",
            f"{otherwise} of {sets}",
            otherwise <= limits.otherwise * sets,
        ),
    ]


def figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "recorded": stated([one.recorded for one in verdicts]),
        "control": stated([one.control for one in verdicts]),
        "of_each": [
            {
                "recorded": float(one.recorded.mean()),
                "control": float(one.control.mean()),
                "rounds": one.rounds,
                "sets": one.sets,
                "chosen_otherwise": one.otherwise,
                "tolerance": one.tolerance,
            }
            for one in verdicts
        ],
    }


def stated(errors: Sequence[np.ndarray]) -> dict[str, float]:
    """Of all tokens, in nats."""
    joined = np.concatenate(errors)
    return {
        "mean": float(joined.mean()),
        "p50": float(np.median(joined)),
        "most": float(joined.max()),
        "tokens": len(joined),
    }
