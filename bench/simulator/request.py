"""One request from its prefill on: when rounds fall due, and what they choose."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .cache import VACANT
from .decoder import Decoder
from .history import History
from .observed import Observed
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
    """Logical positions kept, ascending: int64 [layers or 1, kv heads or 1, budget in pages];
    where sets differ in size, the smaller begin with -1."""
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

    def expects(self, length: int) -> bool:
        """Whether the next recorded round was held at a logical length of at most `length`."""
        number = len(self.rounds)
        if self.recorded is None or number >= len(self.recorded):
            return False
        return int(np.asarray(self.recorded[number]).max()) < length

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
        kept = positions.gather(2, index.clamp(min=0)).masked_fill(index < 0, VACANT).numpy()
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
    """Extends a history by tokens, and evicts within a private region at its end."""

    def __init__(
        self,
        decoder: Decoder,
        history: History,
        page_size: int,
        ledger: Ledger,
        prompt: Sequence[int],
    ) -> None:
        policy = ledger.policy
        self.decoder = decoder
        self.history = history
        self.page_size = page_size
        self.ledger = ledger
        self.keep = round_up(policy.budget, page_size)
        self.limit = self.keep + round_up(policy.interval, page_size)
        self.stagger = stagger_slots(policy, prompt, page_size)
        self.open_region()

    def open_region(self) -> None:
        """All that is resident, up to a whole page, is beyond eviction from now on."""
        self.start = round_up(self.history.physical, self.page_size)
        """Slots (list places) below are never evicted."""
        self.begin = self.start + self.history.delta
        """Logical position of the first token in the region."""
        self.due = self.limit
        """Tokens in the region when its next round is held."""

    def prefill(self, ids: list[int], reused: int) -> torch.Tensor:
        """Cut the history back to the first `reused` of these tokens, feed the others.

        ids: the whole logical prompt. Returns the final hidden state of its last token [1, width].
        """
        if not 0 <= reused < len(ids):
            raise ValueError(f"{reused} tokens reused of a prompt of {len(ids)}")
        self.history.truncate(reused)
        hidden = self.feed(ids[reused:])[-1:]
        self.open_region()
        self.due -= self.stagger
        return hidden

    def steps_until_round(self) -> int | None:
        """Decode steps that run before the next round; None: there will be none."""
        if not self.ledger.policy.evicts:
            return None
        return max(0, self.start + self.due - self.history.physical)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Run these tokens at the next logical positions; final hidden states [T, width]."""
        hidden = self.decoder.feed(ids, self.history.length, self.history.cache)
        self.history.length += len(ids)
        return hidden

    def evict(self, step: int) -> None:
        """Hold the round that precedes decode step `step`."""
        cache = self.history.cache
        index = self.ledger.decide(step, self.candidates())
        shared = index.expand(len(cache), self.decoder.kv_heads, -1)
        self.history.keep(self.start, self.begin, shared)
        self.due = self.limit + index.shape[-1] - self.keep

    def candidates(self) -> Candidates:
        """What a round would choose from now."""
        cache = self.history.cache
        return Candidates(
            keys=torch.stack([kv.keys[:, self.start :] for kv in cache]),
            values=torch.stack([kv.values[:, self.start :] for kv in cache]),
            positions=torch.stack([kv.positions[:, self.start :] for kv in cache]),
            length=self.history.length,
            keep=self.keep,
            rope=self.decoder.rope,
            stats=self.ledger.stats,
            observed=self.observed() if self.ledger.policy.live else None,
        )

    def observed(self) -> Observed:
        """What policies with live queries see now."""
        cache = self.history.cache
        return Observed(
            keys=torch.stack([kv.rotated for kv in cache]),
            queries=torch.stack([kv.queries for kv in cache]),
            received=torch.stack([kv.received[:, self.start :] for kv in cache]),
            resident=torch.stack([kv.positions != VACANT for kv in cache]),
            start=self.start,
            scaling=self.decoder.scaling,
        )


def round_up(tokens: int, page_size: int) -> int:
    """Tokens in whole pages."""
    return -(-tokens // page_size) * page_size


def stagger_slots(policy: Policy, prompt: Sequence[int], page_size: int) -> int:
    """Tokens by which the first round behind a prefill precedes a full region.

    A number of whole pages that the prompt draws by its checksum, so that requests that begin
    together do not evict together. At least max(1, recent) tokens of the interval are there.
    """
    spare = round_up(policy.interval, page_size) - max(1, policy.recent)
    pages = max(0, spare) // page_size
    checksum = zlib.crc32(np.asarray(prompt, dtype="<i8").tobytes())
    return checksum % (pages + 1) * page_size
