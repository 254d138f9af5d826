"""What the baselines with live queries share."""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..observed import Observed
from ..policies import Candidates, Ranking, RecentStay, newest


class LiveQueries(RecentStay):
    """Ranks by the request's own queries; the last `recent` tokens stay."""

    live = True

    def rank(self, candidates: Candidates) -> Ranking:
        if candidates.observed is None:
            raise ValueError(f"{type(self).__name__} needs the request's own queries")
        return Ranking(self.scores(candidates.observed), newest(candidates, self.recent))

    @abstractmethod
    def scores(self, observed: Observed) -> torch.Tensor:
        """float64 [layers, kv heads, n]."""
