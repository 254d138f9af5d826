"""What a policy is: given the candidates of a round, it says which are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from sglang_tri.kernels.moves import Budgets, Moves
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import Scores
from sglang_tri.kernels.select import aggregate, nothing, select
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.parts import Geometry, Parts

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig


@dataclass(frozen=True)
class Candidates:
    """The candidates of one round, or of a part of it.

    Attributes:
        settings: the requests' settings.
        keys: the engine's key cache of all layers, after RoPE.
        key_scale: float32 [layers], what stored keys are to be multiplied by, or None.
        pages: where the candidates lie, in slot order.
        logical: int64 [requests], logical lengths.
        budgets: how many each request keeps.
        queries: virtual queries, where the policy needs statistics.
        workspace: memory for results.
    """

    settings: KvPolicyConfig
    keys: PagedBuffers
    key_scale: torch.Tensor | None
    pages: Pages
    logical: torch.Tensor
    budgets: Budgets
    queries: Queries | None
    workspace: Workspace

    @property
    def layers(self) -> int:
        return len(self.keys)

    def geometry(self) -> Geometry:
        """What the memory of a round depends on."""
        by_layer = self.settings.eviction_mode == "per-layer-per-head"
        longest, kept = self.pages.longest, self.budgets.largest
        return Geometry.of(self.keys, self.queries, by_layer, longest, kept)

    def parts(self) -> Parts:
        """How much of this is scored at a time."""
        return Parts.of(self.workspace.size, self.geometry())

    def of_requests(self, first: int, last: int) -> Candidates:
        """Requests [first, last)."""
        return replace(
            self,
            pages=self.pages.part(first, last),
            logical=self.logical[first:last],
            budgets=self.budgets.part(first, last),
        )

    def of_layers(self, first: int, last: int) -> Candidates:
        """Layers [first, last)."""
        return replace(
            self,
            keys=self.keys.part(first, last),
            key_scale=None if self.key_scale is None else self.key_scale[first:last],
            queries=None if self.queries is None else self.queries.part(first, last),
        )


class Policy(ABC):
    """Chooses what is kept. Declares what it needs; the server does not start without it."""

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False
    needs_second_moments: ClassVar[bool] = False
    needs_live_queries: ClassVar[bool] = False
    keeps_order: ClassVar[bool] = False

    @classmethod
    def by_layer(cls, settings: KvPolicyConfig) -> bool:
        """Whether each layer has kept sets of its own."""
        return False

    @abstractmethod
    def moves(self, candidates: Candidates) -> Moves:
        """What leaves the kept candidates in the first slots.

        The last `settings.recent` candidates have to end up, in order, in the last of these.
        """


class ScoringPolicy(Policy):
    """A policy that gives every candidate a score; the best are kept, and the most recent."""

    @abstractmethod
    def score(self, candidates: Candidates) -> Scores:
        """Scores of the candidates in the layers given; higher is kept."""

    @classmethod
    def by_layer(cls, settings: KvPolicyConfig) -> bool:
        return settings.eviction_mode == "per-layer-per-head"

    def moves(self, candidates: Candidates) -> Moves:
        settings, step = candidates.settings, candidates.parts().layers
        *before, last = range(0, candidates.layers, step)
        earlier = self._aggregate(candidates, before, step) if before else None
        return select(
            self.score(candidates.of_layers(last, candidates.layers)),
            candidates.pages,
            candidates.budgets,
            candidates.keys.heads,
            settings.eviction_mode,
            settings.normalize,
            self.keeps_order,
            earlier,
            candidates.workspace,
        )

    def _aggregate(self, candidates: Candidates, firsts: list[int], step: int) -> torch.Tensor:
        """What the layers from each of `firsts` on come to, `step` at a time."""
        settings, pages, memory = candidates.settings, candidates.pages, candidates.workspace
        heads, mode = candidates.keys.heads, settings.eviction_mode
        shape = (1, pages.requests, 1 if mode == "union" else heads, pages.longest)
        rows = memory.take(*shape, dtype=torch.float32).fill_(nothing(mode))
        used = memory.used
        for first in firsts:
            scores = self.score(candidates.of_layers(first, first + step))
            aggregate(scores, pages, heads, mode, rows, settings.normalize, memory)
            memory.reset(used)
        return rows
