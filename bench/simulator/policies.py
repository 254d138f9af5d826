"""Eviction policies: each ranks the candidates of a round, the rest is common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from .observed import Observed
from .rope import Rope
from .scoring import combine, key_scores
from .stats import Stats

MODES = ("per-head", "per-layer-per-head", "union")


@dataclass(frozen=True)
class Candidates:
    """What a policy sees in a round: the request's n evictable tokens, in logical order."""

    keys: torch.Tensor
    """Before RoPE: [layers, kv heads, n, head_dim]."""
    values: torch.Tensor
    """[layers, kv heads, n, head_dim]."""
    positions: torch.Tensor
    """Logical positions: int64 [layers, kv heads, n], ascending; negative where there is none."""
    length: int
    """Logical length t of the request: the position that the coming step feeds."""
    keep: int
    """How many of the n stay."""
    rope: Rope
    stats: Stats | None
    observed: Observed | None = None
    """For policies that rank by the request's own queries."""

    def __len__(self) -> int:
        return self.positions.shape[-1]


@dataclass(frozen=True)
class Ranking:
    """A policy's verdict; protected candidates stay, the best scored fill up."""

    scores: torch.Tensor
    """float64 [layers or 1, kv heads or 1, n]; an axis of 1 means one set for all."""
    protected: torch.Tensor
    """bool [n]."""
    counts: torch.Tensor | None = None
    """How many each set keeps: int64 [layers, kv heads]; None: as many as there are to be kept."""


def newest(candidates: Candidates, count: int) -> torch.Tensor:
    """Marks the last `count` candidates: bool [n]."""
    return torch.arange(len(candidates)) >= len(candidates) - count


class Policy(ABC):
    """Budget and interval are in tokens, before rounding up to whole pages.

    `live`: whether it ranks by the request's own queries, see `Candidates.observed`.
    `recent`: so many tokens at least are there beyond the budget when a round is held.
    """

    live = False

    def __init__(self, budget: int, interval: int, recent: int) -> None:
        if budget < 1 or interval < 1:
            raise ValueError(f"budget {budget}, interval {interval}: both at least 1")
        self.budget = budget
        self.interval = interval
        self.recent = recent

    @property
    def evicts(self) -> bool:
        """Whether rounds happen at all."""
        return True

    @abstractmethod
    def rank(self, candidates: Candidates) -> Ranking:
        """Judge the candidates of one round."""


class NoEviction(Policy):
    """Keeps everything."""

    def __init__(self) -> None:
        super().__init__(1, 1, 0)

    @property
    def evicts(self) -> bool:
        return False

    def rank(self, candidates: Candidates) -> Ranking:
        raise RuntimeError("a policy without rounds was asked to rank")


class Streaming(Policy):
    """StreamingLLM (arXiv 2309.17453) over the generation: its first tokens and its last."""

    def __init__(self, budget: int, interval: int, sinks: int = 4, recent: int = 16) -> None:
        super().__init__(budget, interval, recent)
        if not 0 <= sinks <= budget:
            raise ValueError(f"{sinks} sinks in a budget of {budget}")
        self.sinks = sinks

    def rank(self, candidates: Candidates) -> Ranking:
        place = torch.arange(len(candidates))
        latest = newest(candidates, candidates.keep - self.sinks)
        protected = (place < self.sinks) | latest
        return Ranking(torch.zeros(1, 1, len(candidates), dtype=torch.float64), protected)


class RecentStay(Policy):
    """The last `recent` tokens stay, inside the budget.

    Raises ValueError where they exceed it.
    """

    def __init__(self, budget: int, interval: int, recent: int = 16) -> None:
        super().__init__(budget, interval, recent)
        if not 0 <= recent <= budget:
            raise ValueError(f"{recent} recent tokens in a budget of {budget}")


class TriAttention(RecentStay):
    """Keys scored by expected future queries (arXiv 2604.04921); the last `recent` stay."""

    def __init__(
        self,
        budget: int,
        interval: int,
        recent: int = 16,
        mode: str = "per-head",
        normalize: bool = True,
    ) -> None:
        super().__init__(budget, interval, recent)
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(MODES)}")
        self.mode = mode
        self.normalize = normalize

    def rank(self, candidates: Candidates) -> Ranking:
        scores = combine(self.scores(candidates), self.mode, self.normalize)
        return Ranking(scores, newest(candidates, self.recent))

    def scores(self, candidates: Candidates) -> torch.Tensor:
        """Raw scores S(k): float64 [layers, kv heads, query heads per kv head, n]."""
        stats, rope = candidates.stats, candidates.rope
        if stats is None:
            raise ValueError("TriAttention needs query statistics")
        kv_heads = candidates.keys.shape[1]
        return torch.stack(
            [
                key_scores(
                    rope.pairs(keys),
                    candidates.length - positions,
                    mean.unflatten(0, (kv_heads, -1)),
                    abs_mean.unflatten(0, (kv_heads, -1)),
                    rope.omega,
                    rope.scale,
                )
                for keys, positions, mean, abs_mean in zip(
                    candidates.keys,
                    candidates.positions,
                    stats.mean,
                    stats.abs_mean,
                    strict=True,
                )
            ]
        )
