"""Future attention: what future queries will in truth attend to. No policy can know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..cache import LayerCache
from ..decoder import Decoder
from ..policies import Candidates, Ranking, RecentStay, TriAttention, newest


class FutureAttention(RecentStay):
    """Each layer and KV head keeps the tokens that some later query will attend to most.

    Attention is that of a run without eviction, over the very tokens that are to come:
    `look_ahead` must have seen them. Where this gets far, the budget suffices; there may be better.
    """

    paid: torch.Tensor | None = None

    def look_ahead(self, decoder: Decoder, ids: Sequence[int]) -> torch.Tensor:
        """Read a whole request, prompt and output, before its first round: `attention_paid`."""
        self.paid = attention_paid(decoder, ids)
        return self.paid

    def rank(self, candidates: Candidates) -> Ranking:
        """Raises ValueError where nothing was looked at."""
        if self.paid is None:
            raise ValueError("future attention needs the request's tokens: look_ahead")
        most = self.paid[:, :, candidates.length :].amax(dim=2).to(torch.float64)
        return Ranking(most.gather(2, candidates.positions), newest(candidates, self.recent))


class Spliced(FutureAttention):
    """Future attention in some KV heads, TriAttention's score in the others: which ones matter?

    heads: (layer, KV head) where future attention chooses, or with `but`, where it does not.
    """

    def __init__(
        self,
        budget: int,
        interval: int,
        recent: int = 16,
        heads: Sequence[tuple[int, int]] = (),
        but: bool = False,
    ) -> None:
        super().__init__(budget, interval, recent)
        self.score = TriAttention(budget, interval, recent, "per-layer-per-head")
        self.heads = list(heads)
        self.but = but

    def rank(self, candidates: Candidates) -> Ranking:
        future, score = super().rank(candidates), self.score.rank(candidates)
        chosen = torch.full(score.scores.shape[:2], self.but)
        for layer, head in self.heads:
            chosen[layer, head] = not self.but
        mixed = future.scores.where(chosen[..., None], score.scores)
        return Ranking(mixed, score.protected)


def attention_paid(decoder: Decoder, ids: Sequence[int]) -> torch.Tensor:
    """Without eviction, the most that a group's heads pay: [layers, kv heads, query n, key n]."""
    sizes = (decoder.heads, decoder.kv_heads, decoder.head_dim)
    cache = [_Watched.empty(*sizes, decoder.dtype) for _ in range(decoder.layers)]
    decoder.feed(list(ids), 0, list(cache))
    return torch.stack([layer.paid(len(ids)) for layer in cache])


@dataclass
class _Watched(LayerCache):
    """Remembers all weights."""

    seen: list[torch.Tensor] = field(default_factory=list)

    def observe(self, queries: torch.Tensor, weights: torch.Tensor) -> None:
        super().observe(queries, weights)
        self.seen.append(weights.amax(dim=1))

    def paid(self, tokens: int) -> torch.Tensor:
        wide = [torch.nn.functional.pad(part, (0, tokens - part.shape[-1])) for part in self.seen]
        return torch.cat(wide, dim=1)
