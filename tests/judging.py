"""The simulator's judgement of a server's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.simulator.oracle import Oracle, Replay
from tests.client import Answer, recorded_rounds, simulated
from tests.conftest import Running

LEAST_ROUNDS = 5
RAW_SCORES = 50  # Their size in the tiny models; normalized ones are of order 1.
MOST_FOLLOWED = 0.001  # Share of choices where a near tie was decided by the server.


@dataclass(frozen=True)
class Limits:
    """How far a server may be from the simulator.

    Attributes:
        logprobs: in nats.
        scores: of candidates that may be chosen one for the other, normalized.
        margins: of logits of which either may be the greatest.
    """

    logprobs: float = 1e-4
    scores: float = 1e-5
    margins: float = 0.0


def check(
    oracle: Oracle, running: Running, answers: Sequence[Answer], limits: Limits | None = None
) -> None:
    """Log-probabilities, greedy tokens and rounds are the simulator's, kept sets but for ties."""
    limits = limits or Limits()
    counts: Counter[str] = Counter()
    for answer in answers:
        judged = _replay(oracle, running, answer, limits)
        difference = answer.error(judged.logprobs)
        assert difference < limits.logprobs, (answer.ask.policy, difference)
        if answer.ask.temperature == 0:
            other = judged.greedy != np.array(answer.ids)
            assert (judged.margins[other] < limits.margins).all(), answer.ask.policy
        if answer.ask.policy.get("policy") != "none":
            assert len(judged.rounds) >= LEAST_ROUNDS
            # With overlap, a step beyond the last token is already under way when it is known.
            assert judged.surplus in (0, 1)
            assert answer.meta["kv_policy"]["rounds"] == len(judged.rounds) + judged.surplus
        else:
            assert "kv_policy" not in answer.meta
        counts["choices"] += sum(done.kept.size for done in judged.rounds)
        counts["followed"] += judged.followed
    assert counts["followed"] <= MOST_FOLLOWED * counts["choices"]


def _replay(oracle: Oracle, running: Running, answer: Answer, limits: Limits) -> Replay:
    own = answer.ask.policy
    return oracle.replay(
        answer.ask.prompt,
        answer.ids,
        simulated(own),
        page_size=running.setup.page_size,
        recorded=recorded_rounds(running.trace, answer.rid)
        if own.get("policy") != "none"
        else None,
        tolerance=limits.scores * (1 if own.get("normalize", True) else RAW_SCORES),
    )
