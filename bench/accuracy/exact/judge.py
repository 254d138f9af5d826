"""What the float32 simulator says of a server's outputs: with the recorded kept sets and without.

The control, without eviction, must be far off, or the comparison could not fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.simulator.conversation import Conversation
from bench.simulator.oracle import Oracle
from bench.simulator.policies import Policy
from bench.simulator.registry import make_policy
from bench.simulator.selection import RoundMismatch
from bench.simulator.trace import Replay

from .client import Answer

# With overlap scheduling a step beyond the last token is already under way when it is known.
_STEPS_AHEAD = 1


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


@dataclass(frozen=True)
class Recorded:
    """A request's rounds, in order.

    Attributes:
        kept: logical positions, int64 [layers or 1, kv_heads or 1, kept] each.
        lengths: logical lengths at which they were held.
    """

    kept: list[np.ndarray]
    lengths: list[int]

    @classmethod
    def read(cls, trace: Path, rid: str) -> Recorded:
        """Those that a server wrote into the folder `trace`."""
        kept, lengths = [], []
        for path in sorted(trace.glob(f"{rid}-*.npz")):
            with np.load(path) as done:
                kept.append(done["kept"])
                lengths.append(int(done["logical"]))
        return cls(kept, lengths)


class Judge:
    """Holds the simulator, on the CPU.

    Args:
        model: model folder.
        stats: query statistics in the official layout.
        budget, interval: the server's.
        think_end: token ids that end thinking, which close a private region; may be empty.
        tolerance: score units within which another choice of the server's is followed at first.
    """

    def __init__(
        self,
        model: Path,
        stats: Path,
        budget: int,
        interval: int,
        think_end: Sequence[int],
        tolerance: float,
    ) -> None:
        self._oracle = Oracle(model, stats)
        self._budget, self._interval = budget, interval
        self._think_end = list(think_end)
        self._tolerance = tolerance

    def policy(self, mode: str | None) -> Policy:
        return make_policy("triattention", self._budget, self._interval, mode=mode or "per-head")

    def conversation(self, mode: str | None, page_size: int) -> Conversation:
        return self._oracle.conversation(self.policy(mode), page_size)

    def without_eviction(self, answer: Answer) -> np.ndarray:
        """|difference| in nats, float64 [tokens]."""
        full = self._oracle.replay(answer.ask.prompt, answer.ids, make_policy("none"))
        return np.abs(full.logprobs - answer.logprobs)

    def with_own_sets(self, answer: Answer, page_size: int) -> np.ndarray:
        """|difference| in nats with the sets that the simulator keeps, float64 [tokens]."""
        talk = self.conversation(answer.ask.mode, page_size)
        closes = self._closes(answer.ids)
        own = talk.turn(answer.ask.prompt, answer.ids, 0, closes=closes)
        return np.abs(own.logprobs - answer.logprobs)

    def verdict(self, talk: Conversation, answer: Answer, recorded: Recorded) -> Verdict:
        """The answer as the next turn of `talk`.

        Raises:
            RoundMismatch: the record is not of such rounds.
        """
        # What a first prompt shares with others' is exact: computed anew, it is the same.
        cached = answer.meta["cached_tokens"] if talk.length else 0
        judged, tolerance = self._follow(talk, answer, recorded, cached)
        held = [done.length for done in judged.rounds]
        known = len(recorded.kept)
        return Verdict(
            recorded=np.abs(judged.logprobs - answer.logprobs),
            control=self.without_eviction(answer),
            rounds=known,
            agree=recorded.lengths[: len(held)] == held
            and 0 <= judged.surplus <= _STEPS_AHEAD
            and answer.rounds == known,
            sets=sum(kept.shape[0] * kept.shape[1] for kept in recorded.kept),
            otherwise=judged.followed,
            tolerance=tolerance,
        )

    def _follow(
        self, talk: Conversation, answer: Answer, recorded: Recorded, cached: int
    ) -> tuple[Replay, float]:
        """The replay with the recorded sets, and the tolerance that follows them all."""
        tolerance = self._tolerance
        while True:
            try:
                return (
                    talk.turn(
                        answer.ask.prompt,
                        answer.ids,
                        cached,
                        recorded.kept,
                        closes=self._closes(answer.ids),
                        tolerance=tolerance,
                    ),
                    tolerance,
                )
            except RoundMismatch as mismatch:
                if not math.isfinite(mismatch.margin):
                    raise
                tolerance = mismatch.margin

    def _closes(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Where the end of thinking closes the private region."""
        mark = self._think_end
        ends = range(len(mark), len(ids) + 1) if mark else ()
        return next(((end,) for end in ends if list(ids[end - len(mark) : end]) == mark), ())
