"""What a policy is: given the candidates of a round, it says which are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from sglang_tri.kernels.select import aggregate, normalize, select

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig
    from sglang_tri.queries import VirtualQueries


# Scores that exist at a time; bigger rounds are split by request.
SCORE_BYTES = 16 << 20


@dataclass(frozen=True)
class Candidates:
    """The candidates of one round.

    Attributes:
        settings: the requests' settings.
        keys: per layer [slots, kv_heads, head_dim], the engine's key cache, after RoPE.
        slots: int64 [requests, candidates], in slot order.
        logical: int64 [requests], logical lengths.
        kept: how many are to be kept.
        queries: virtual queries, where the policy needs statistics.
    """

    settings: KvPolicyConfig
    keys: Sequence[torch.Tensor]
    slots: torch.Tensor
    logical: torch.Tensor
    kept: int
    queries: VirtualQueries | None

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[1]

    @property
    def score_bytes(self) -> int:
        """Bytes of one request's float32 scores."""
        rows = len(self.keys) * self.kv_heads
        if self.queries is not None:
            rows = self.queries.magnitude[..., 0].numel()
        return 4 * rows * self.slots.shape[1]

    def split(self, requests: int) -> Iterator[Candidates]:
        """The same candidates in parts of at most `requests` requests."""
        for slots, logical in zip(
            self.slots.split(requests), self.logical.split(requests), strict=True
        ):
            yield replace(self, slots=slots, logical=logical)


class Policy(ABC):
    """Chooses what is kept. Declares what it needs; the server does not start without it."""

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False
    needs_live_queries: ClassVar[bool] = False
    keeps_order: ClassVar[bool] = False

    @abstractmethod
    def keep(self, candidates: Candidates) -> torch.Tensor:
        """Indices of the kept candidates.

        Returns:
            int64 [layers or 1, requests, kv_heads or 1, kept], ascending; its last
            `settings.recent` entries are the last candidates unless `keeps_order`.
        """


class ScoringPolicy(Policy):
    """A policy that gives every candidate a score; the best are kept, and the most recent."""

    @abstractmethod
    def score(self, candidates: Candidates) -> torch.Tensor:
        """float32 [layers, requests, query_heads, candidates]; higher is kept."""

    def keep(self, candidates: Candidates) -> torch.Tensor:
        at_once = max(1, SCORE_BYTES // candidates.score_bytes)
        return torch.cat([self._keep(part) for part in candidates.split(at_once)], 1)

    def _keep(self, candidates: Candidates) -> torch.Tensor:
        settings = candidates.settings
        scores = self.score(candidates)
        if settings.normalize:
            scores = normalize(scores)
        rows = aggregate(scores, candidates.kv_heads, settings.eviction_mode)
        return select(rows, candidates.kept, settings.recent)
