"""What the float32 simulator says of a server's outputs: with the recorded kept sets and without.

The control, without eviction, must be far off, or the comparison could not fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.accuracy.client import Answer, Recorded
from bench.simulator.conversation import Conversation
from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from bench.simulator.selection import RoundMismatch

from .servers import BUDGET, INTERVAL


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
class Verdict:
    """Of one output.

    Attributes:
        recorded: |difference| of log-probabilities in nats with the recorded sets, float64
            [tokens].
        control: likewise, without eviction.
        rounds: as many as the server recorded.
        agree: whether it held them where the simulator does, and reports as many.
        sets: kept sets, over all rounds.
        otherwise: those that the simulator would have chosen otherwise.
        tolerance: score units from the edge of their set within which all of those lie.
    """

    recorded: np.ndarray
    control: np.ndarray
    rounds: int
    agree: bool
    sets: int
    otherwise: int
    tolerance: float


class Judge:
    """Holds the simulator, on the CPU.

    Args:
        model: model folder.
        stats: query statistics in the official layout.
        think_end: token ids that end thinking, which close a private region; may be empty.
        limits: what the servers' dtype allows.
    """

    def __init__(self, model: Path, stats: Path, think_end: Sequence[int], limits: Limits) -> None:
        self._oracle = Oracle(model, stats)
        self._think_end = list(think_end)
        self.limits = limits

    def conversation(self, answer: Answer, page_size: int) -> Conversation:
        """One that begins with the answer's request."""
        mode = answer.ask.policy.get("eviction_mode", "per-head")
        policy = make_policy("triattention", BUDGET, INTERVAL, mode=mode)
        return self._oracle.conversation(policy, page_size)

    def without_eviction(self, answer: Answer) -> np.ndarray:
        """|difference| in nats, float64 [tokens]."""
        full = self._oracle.replay(answer.ask.prompt, answer.ids, make_policy("none"))
        return np.abs(full.logprobs - answer.logprobs)

    def with_own_sets(self, answer: Answer, page_size: int) -> np.ndarray:
        """|difference| in nats with the sets that the simulator keeps, float64 [tokens]."""
        talk, closes = self.conversation(answer, page_size), self._closes(answer.ids)
        own = talk.turn(answer.ask.prompt, answer.ids, 0, closes=closes)
        return np.abs(own.logprobs - answer.logprobs)

    def verdict(self, talk: Conversation, answer: Answer, recorded: Recorded) -> Verdict:
        """The answer as the next turn of `talk`.

        Raises:
            RoundMismatch: the record is not of such rounds.
        """
        # What a first prompt shares with others' is exact: computed anew, it is the same.
        cached = answer.meta["cached_tokens"] if talk.length else 0
        turn = answer.ask.prompt, answer.ids, cached, recorded.kept
        closes, tolerance = self._closes(answer.ids), self.limits.near
        while True:  # Until the tolerance is one that follows all choices.
            try:
                judged = talk.turn(*turn, closes=closes, tolerance=tolerance)
                break
            except RoundMismatch as mismatch:
                if not math.isfinite(mismatch.margin):
                    raise
                tolerance = mismatch.margin
        held, known = [done.length for done in judged.rounds], len(recorded.kept)
        return Verdict(
            recorded=np.abs(judged.logprobs - answer.logprobs),
            control=self.without_eviction(answer),
            rounds=known,
            agree=recorded.lengths[: len(held)] == held
            # A step beyond the last token is already under way when that is known.
            and 0 <= judged.surplus <= 1
            and answer.rounds == known,
            sets=sum(kept.shape[0] * kept.shape[1] for kept in recorded.kept),
            otherwise=judged.followed,
            tolerance=tolerance,
        )

    def _closes(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Where the end of thinking closes the private region."""
        mark = self._think_end
        ends = range(len(mark), len(ids) + 1) if mark else ()
        return next(((end,) for end in ends if list(ids[end - len(mark) : end]) == mark), ())
