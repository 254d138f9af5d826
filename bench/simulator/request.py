"""One request from its prefill on: when rounds fall due, and what they do to the KV lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .decoder import Decoder
from .policies import Candidates, Policy
from .selection import RoundMismatch, reconcile, select
from .stats import Stats

KeptSet = np.ndarray | torch.Tensor | Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Round:
    """One eviction."""

    step: int
    """The output token k whose decode step it precedes."""
    length: int
    """Logical length t just before that step."""
    candidates: int
    """Number n of evictable tokens."""
    kept: np.ndarray
    """Logical positions kept, ascending: int64 [layers or 1, kv heads or 1, budget in pages]."""
    margin: float
    """Lowest kept contested score minus best evicted, smallest over the sets; may be inf."""
    followed: int
    """How many of the sets were taken from the record against the oracle's own choice."""


class Ledger:
    """Makes each round's choice, and holds it against a record if there is one."""

    def __init__(
        self,
        policy: Policy,
        stats: Stats | None,
        recorded: Sequence[KeptSet] | None,
        tolerance: float,
    ) -> None:
        self.policy = policy
        self.stats = stats
        self.recorded = recorded
        self.tolerance = tolerance
        self.rounds: list[Round] = []

    def decide(self, step: int, candidates: Candidates) -> torch.Tensor:
        """Note a round and return its kept candidates: int64 [layers or 1, kv heads or 1, keep]."""
        selection = select(self.policy.rank(candidates), candidates.keep)
        layers, heads, _ = selection.index.shape
        positions = candidates.positions[:layers, :heads]
        index, followed = selection.index, 0
        if self.recorded is not None:
            number = len(self.rounds)
            if number >= len(self.recorded):
                raise RoundMismatch(number, 0, 0, torch.inf, "not in the record")
            theirs = torch.as_tensor(np.asarray(self.recorded[number]), dtype=torch.int64)
            index, followed = reconcile(number, selection, positions, theirs, self.tolerance)
        kept = positions.gather(2, index).numpy()
        self.rounds.append(
            Round(
                step,
                candidates.length,
                len(candidates),
                kept,
                selection.margin,
                followed,
            )
        )
        return index


class Request:
    """The KV lists of a request whose first tokens were prefilled in full."""

    def __init__(self, decoder: Decoder, ids: list[int], page_size: int, ledger: Ledger) -> None:
        policy = ledger.policy
        self.decoder = decoder
        self.ledger = ledger
        self.keep = round_up(policy.budget, page_size)
        self.limit = self.keep + round_up(policy.interval, page_size)
        self.start = round_up(len(ids), page_size)
        """Slots below are never evicted."""
        self.length = 0
        """Logical length t."""
        self.cache = decoder.new_cache()
        self.hidden = self.feed(ids)[-1:]
        """Final hidden state of the prefill's last token: [1, width]."""

    @property
    def physical(self) -> int:
        """Resident tokens of a head."""
        return len(self.cache[0])

    def steps_until_round(self) -> int | None:
        """Decode steps that run before the next round; None: there will be none."""
        if not self.ledger.policy.evicts:
            return None
        return max(0, self.start + self.limit - self.physical)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Run these tokens at the next logical positions; final hidden states [T, width]."""
        hidden = self.decoder.feed(ids, self.length, self.cache)
        self.length += len(ids)
        return hidden

    def evict(self, step: int) -> None:
        """Hold the round that precedes decode step `step`."""
        candidates = Candidates(
            keys=torch.stack([kv.keys[:, self.start :] for kv in self.cache]),
            values=torch.stack([kv.values[:, self.start :] for kv in self.cache]),
            positions=torch.stack([kv.positions[:, self.start :] for kv in self.cache]),
            length=self.length,
            keep=self.keep,
            rope=self.decoder.rope,
            stats=self.ledger.stats,
        )
        index = self.ledger.decide(step, candidates)
        shared = index.expand(len(self.cache), self.decoder.kv_heads, -1)
        for kv, own in zip(self.cache, shared, strict=True):
            kv.keep(self.start, own)


def round_up(tokens: int, page_size: int) -> int:
    """Tokens in whole pages."""
    return -(-tokens // page_size) * page_size
