"""Ada-KV (arXiv 2407.11550): heads of a layer compete for its budget."""

from __future__ import annotations

import torch

from ..policies import Candidates, Ranking
from ..selection import apportion
from .snapkv import SnapKV

FLOOR = 0.2
"""Share of the budget that is divided equally: the authors' default."""


class AdaKV(SnapKV):
    """SnapKV's scores; the best of a layer, whatever its head, are kept.

    A layer keeps as many as under a uniform budget, each KV head its own number of them. Paged
    attention has one length for all heads, so that this is for the simulator alone.
    """

    def rank(self, candidates: Candidates) -> Ranking:
        ranking = super().rank(candidates)
        alive = candidates.positions >= 0
        contested = alive & ~ranking.protected
        scores = ranking.scores.masked_fill(~contested, -torch.inf)
        counts = [
            head_budgets(layer, candidates.keep - self.window, free)
            for layer, free in zip(scores, contested.sum(dim=-1), strict=True)
        ]
        # Attention is never negative: vacant places come last.
        known = ranking.scores.masked_fill(~alive, -1.0)
        return Ranking(known, ranking.protected, torch.stack(counts) + self.window)


def head_budgets(scores: torch.Tensor, keep: int, free: torch.Tensor) -> torch.Tensor:
    """How many each KV head keeps, `keep` on average: int64 [kv heads].

    scores: [kv heads, n], -inf where a token is not contested; free: contested tokens of each
    head. A share of 1 - FLOOR goes where the layer's best tokens are, the rest to all alike.
    """
    heads = len(scores)
    best = scores.flatten().topk(heads * keep).indices // scores.shape[1]
    wanted = (1 - FLOOR) * torch.bincount(best, minlength=heads) + FLOOR * keep
    return apportion(wanted, free, heads * keep)
