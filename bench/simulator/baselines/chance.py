"""Random eviction: what any policy must beat."""

from __future__ import annotations

import torch

from ..policies import Candidates, Policy, Ranking, newest


class Chance(Policy):
    """A set of its own for each layer and KV head, drawn anew in every round."""

    def __init__(self, budget: int, interval: int, recent: int = 16, seed: int = 0) -> None:
        super().__init__(budget, interval, recent)
        if not 0 <= recent <= budget:
            raise ValueError(f"{recent} recent tokens in a budget of {budget}")
        self.seed = seed

    def rank(self, candidates: Candidates) -> Ranking:
        generator = torch.Generator().manual_seed(self.seed + candidates.length)
        scores = torch.rand(candidates.positions.shape, generator=generator, dtype=torch.float64)
        return Ranking(scores, newest(candidates, self.recent))
