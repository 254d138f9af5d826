"""TriAttention with one thing changed: ablations of the published score, and what may beat it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .policies import Candidates, Ranking, TriAttention
from .scoring import expected_logits
from .selection import apportion


@dataclass(frozen=True)
class Terms:
    """What a score is made of; the default is the published one.

    Attributes:
        trigonometric: whether the expected logit counts.
        offsets: how distances ahead are joined, `mean` or `max`.
        spread: what stands for the queries' deviation from their mean: `norm`, the published
            (E|q_f| - |E q_f|) |k_f|; `variance`, from the log of the expected exponentiated logit
            of a Gaussian query, E|q_f - E q_f|^2 |k_f|^2 / (4 sqrt(head_dim)); `both`; `none`.
        values: whether sqrt(head_dim) log |v| is added: a token counts by what it contributes,
            its exponentiated logit times its value.
        first: so many of the generation's first tokens always stay.
    """

    trigonometric: bool = True
    offsets: str = "mean"
    spread: str = "norm"
    values: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        if self.offsets not in ("mean", "max"):
            raise ValueError(f"offsets {self.offsets!r}: mean or max")
        if self.spread not in ("norm", "variance", "both", "none"):
            raise ValueError(f"spread {self.spread!r}: norm, variance, both or none")


class Variant(TriAttention):
    """Scores of other terms; options as for `TriAttention`."""

    def __init__(self, budget: int, interval: int, terms: Terms, **options: object) -> None:
        super().__init__(budget, interval, **options)  # type: ignore[arg-type]
        if terms.first + self.recent > budget:
            raise ValueError(f"{terms.first} first and {self.recent} recent in {budget} tokens")
        self.terms = terms

    def rank(self, candidates: Candidates) -> Ranking:
        ranking = super().rank(candidates)
        first = torch.arange(len(candidates)) < self.terms.first
        return Ranking(ranking.scores, first | ranking.protected)

    def scores(self, candidates: Candidates) -> torch.Tensor:
        layers = range(len(candidates.keys))
        return torch.stack([self._layer(candidates, layer) for layer in layers])

    def _layer(self, candidates: Candidates, layer: int) -> torch.Tensor:
        """float64 [kv heads, group, n]."""
        rope, stats, terms = candidates.rope, candidates.stats, self.terms
        if stats is None:
            raise ValueError("TriAttention needs query statistics")
        keys = rope.pairs(candidates.keys[layer])
        heads = (len(keys), -1)
        mean, size = (x[layer].unflatten(0, heads) for x in (stats.mean, stats.abs_mean))
        squared = rope.scale * rope.scale
        scores = torch.zeros(*mean.shape[:2], keys.shape[1], dtype=torch.float64)
        if terms.trigonometric:
            distance = candidates.length - candidates.positions[layer]
            logits = torch.stack(
                list(expected_logits(keys, distance, mean, rope.omega, rope.scale))
            )
            scores = scores + (logits.mean(0) if terms.offsets == "mean" else logits.amax(0))
        if terms.spread in ("norm", "both"):
            scores = scores + torch.einsum(
                "hgf,hnf->hgn", (size - mean.abs()) * squared, keys.abs()
            )
        if terms.spread in ("variance", "both"):
            if stats.square is None:
                raise ValueError("the statistics lack E|q|^2")
            variance = stats.square[layer].unflatten(0, heads) - mean.abs().square()
            weight = variance * squared.square() / (4 * candidates.keys.shape[-1] ** 0.5)
            scores = scores + torch.einsum("hgf,hnf->hgn", weight, keys.abs().square())
        if terms.values:
            size = torch.linalg.vector_norm(candidates.values[layer].double(), dim=-1)
            scores = scores + candidates.keys.shape[-1] ** 0.5 * size.log()[:, None]
        return scores


FLOOR = 0.2
"""Share of the budget that all sets have alike."""


class ByConcentration(Variant):
    """Budgets by head: where queries are scattered, scores say less, and more is kept.

    Each layer and KV head has a set of its own, of FLOOR of the budget and a part of the rest in
    proportion to 1 - R (pairs weighted by (E|q_f|)^2, mean over its query heads); all sets together
    keep as much as under one budget for all. For the simulator alone, see `AdaKV`.
    """

    def __init__(self, budget: int, interval: int, **options: object) -> None:
        mode = "per-layer-per-head"
        super().__init__(budget, interval, Terms(), mode=mode, **options)

    def scores(self, candidates: Candidates) -> torch.Tensor:
        found = super().scores(candidates)
        alive = (candidates.positions >= 0)[:, :, None]
        # As the mean, vacant places narrow the deviations of a group's heads alike.
        mean = (found * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True)
        return found.where(alive, mean)

    def rank(self, candidates: Candidates) -> Ranking:
        ranking = super().rank(candidates)
        alive = candidates.positions >= 0
        scattered = 1 - resultant(candidates)
        part = FLOOR + (1 - FLOOR) * scattered / scattered.mean()
        wanted = self.recent + (candidates.keep - self.recent) * part
        total = alive.shape[0] * alive.shape[1] * candidates.keep
        counts = apportion(wanted.flatten(), alive.sum(-1).flatten(), total).view_as(scattered)
        lowest = ranking.scores.min() - 1.0
        return Ranking(ranking.scores.masked_fill(~alive, lowest), ranking.protected, counts)


def resultant(candidates: Candidates) -> torch.Tensor:
    """R of the queries of each KV head: float64 [layers, kv heads]."""
    stats = candidates.stats
    if stats is None:
        raise ValueError("TriAttention needs query statistics")
    centre, size = stats.mean.abs(), stats.abs_mean
    own = (centre * size).sum(-1) / size.square().sum(-1)
    return own.unflatten(1, (candidates.keys.shape[1], -1)).mean(-1)
