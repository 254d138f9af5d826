"""What the baselines with live queries share."""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..observed import Observed
from ..policies import Candidates, Policy, Ranking, newest


class LiveQueries(Policy):
    """Ranks by the request's own queries; the last `recent` tokens stay.

    Raises ValueError where `recent` exceeds the budget.
    """

    live = True

    def __init__(self, budget: int, interval: int, recent: int) -> None:
        super().__init__(budget, interval, recent)
        if not 0 <= recent <= budget:
            raise ValueError(f"{recent} tokens that stay in a budget of {budget}")

    def rank(self, candidates: Candidates) -> Ranking:
        if candidates.observed is None:
            raise ValueError(f"{type(self).__name__} needs the request's own queries")
        return Ranking(self.scores(candidates.observed), newest(candidates, self.recent))

    @abstractmethod
    def scores(self, observed: Observed) -> torch.Tensor:
        """float64 [layers, kv heads, n]."""
