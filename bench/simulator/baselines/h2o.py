"""H2O (arXiv 2306.14048): what was attended to most so far, and as many of the latest."""

from __future__ import annotations

import torch

from ..observed import Observed
from .base import LiveQueries


class H2O(LiveQueries):
    """Attention summed over all queries so far; half of the budget goes to the latest tokens."""

    def __init__(self, budget: int, interval: int) -> None:
        super().__init__(budget, interval, budget // 2)

    def scores(self, observed: Observed) -> torch.Tensor:
        return observed.received.to(torch.float64)
