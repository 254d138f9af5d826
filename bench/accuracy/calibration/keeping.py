"""What different statistics would keep of the very same candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.simulator import Candidates, Ranking, Stats, TriAttention
from bench.simulator.policies import newest
from bench.simulator.rope import Rope
from bench.simulator.scoring import OFFSETS, combine
from bench.simulator.selection import select


@dataclass(frozen=True)
class Shares:
    """How far two choices agree in one round, as means over its sets, 0 to 1.

    Attributes:
        kept: of the tokens that one keeps, the share that the other keeps, too.
        contested: the same without those that every choice keeps.
        evicted: of the tokens that one evicts, the share that the other evicts, too.
    """

    kept: float
    contested: float
    evicted: float


def shares(one: torch.Tensor, other: torch.Tensor, protected: int) -> Shares:
    """Of two choices, bool [..., n], true where a token is kept; each set keeps equally many.

    protected: tokens of a set that every choice keeps.
    """
    keep = float(one.sum(-1).double().mean())
    both = float((one & other).sum(-1).double().mean())
    return _shares(both, one.shape[-1], keep, protected)


def chance(n: int, keep: int, protected: int) -> Shares:
    """What two random choices of `keep` tokens out of n have in common on average."""
    return _shares(protected + (keep - protected) ** 2 / (n - protected), n, keep, protected)


def _shares(both: float, n: int, keep: float, protected: int) -> Shares:
    neither = n - 2 * keep + both
    return Shares(both / keep, (both - protected) / (keep - protected), neither / (n - keep))


class Panel:
    """Several statistics of one model, asked together."""

    def __init__(self, statistics: Sequence[Stats], rope: Rope) -> None:
        """The score is linear in the mean query: its 17 offsets fold into one virtual query."""
        squared = rope.scale * rope.scale
        offsets = torch.tensor(OFFSETS, dtype=torch.float64)
        angles = offsets[:, None] * rope.omega
        ahead = torch.polar(torch.ones_like(angles), angles).mean(0) * squared
        mean = torch.stack([stats.mean for stats in statistics])
        size = torch.stack([stats.abs_mean for stats in statistics])
        self.rope = rope
        self.virtual = mean * ahead
        """complex128 [statistics, layers, query heads, F]."""
        self.weight = (size - mean.abs()) * squared
        """float64, likewise."""

    def scores(self, candidates: Candidates) -> torch.Tensor:
        """As `TriAttention.scores`: float64 [statistics, layers, kv heads, group, n]."""
        layers, heads = candidates.keys.shape[:2]
        keys = self.rope.pairs(candidates.keys)
        angles = (candidates.length - candidates.positions).double()[..., None] * self.rope.omega
        turned = keys.conj() * torch.polar(torch.ones_like(angles), angles)
        found = []
        for layer in range(layers):
            virtual = self.virtual[:, layer].unflatten(1, (heads, -1))
            weight = self.weight[:, layer].unflatten(1, (heads, -1))
            # Re(ab) = Re a Re b - Im a Im b, and the norm term: one product of real matrices.
            left = torch.cat([virtual.real, -virtual.imag, weight], dim=-1)
            now = turned[layer]
            right = torch.cat([now.real, now.imag, keys[layer].abs()], dim=-1)
            found.append(left @ right.transpose(1, 2))
        return torch.stack(found, dim=1)


class Watching(TriAttention):
    """Evicts by the first statistics of a panel, and notes what each of them would keep."""

    def __init__(self, budget: int, interval: int, recent: int, mode: str, panel: Panel) -> None:
        super().__init__(budget, interval, recent, mode)
        self.panel = panel
        self.rounds: list[list[Shares]] = []
        """A list a round, with an entry for each statistics."""
        self.by_chance: list[Shares] = []
        """An entry a round."""

    def rank(self, candidates: Candidates) -> Ranking:
        """As the first statistics rank."""
        protected = newest(candidates, self.recent)
        rankings = [
            Ranking(combine(scores, self.mode), protected)
            for scores in self.panel.scores(candidates)
        ]
        marks = [_marks(ranking, candidates.keep) for ranking in rankings]
        self.rounds.append([shares(marks[0], other, self.recent) for other in marks])
        self.by_chance.append(chance(len(candidates), candidates.keep, self.recent))
        return rankings[0]


def _marks(ranking: Ranking, keep: int) -> torch.Tensor:
    """True where a token is kept: bool [layers or 1, kv heads or 1, n]."""
    index = select(ranking, keep).index
    return torch.zeros_like(ranking.scores, dtype=torch.bool).scatter(2, index, True)
