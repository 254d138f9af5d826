"""Random eviction: what any policy must beat."""

from __future__ import annotations

import torch

from ..policies import Candidates, Ranking, RecentStay, newest

_WORD = (1 << 32) - 1


class Chance(RecentStay):
    """A set of its own for each KV head, the server's: drawn anew in every round, by a hash."""

    def rank(self, candidates: Candidates) -> Ranking:
        heads, n = candidates.keys.shape[1:3]
        drawn = [
            [fmix32(fmix32(fmix32(candidates.length) + head) + place) >> 8 for place in range(n)]
            for head in range(heads)
        ]
        scores = torch.tensor([drawn], dtype=torch.float64)
        return Ranking(scores, newest(candidates, self.recent))


def fmix32(word: int) -> int:
    """MurmurHash3's finalizer: every bit of a 32-bit word sways every other."""
    word &= _WORD
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ word >> shift) * factor & _WORD
    return word ^ word >> 16
