"""What every request must read: plain lists, without slots, trees or spans, cut as policies do.

An entry is what one token left in one head of one layer: its position and a digest of its token,
its position, its request's `extra_key` and all entries that it was computed over. So whatever is
read from a wrong slot, at a wrong position or over another history shows in every later entry.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.kernels.scores import Scores
from sglang_tri.policies.base import Candidates, ScoringPolicy
from tests.histories.loop import EOS, LONGEST
from tests.histories.tree import salt

LAYERS, HEADS = 2, 2
# The token that ends thinking, and what may follow it where two tokens do.
THINK, DONE = 2, 3
# What an entry consists of; a cached row holds the same once in K and once, altered, in V.
DIGEST, POSITION = 0, 1

_LANES = np.arange(1, LAYERS * HEADS + 1, dtype=np.uint64).reshape(LAYERS, HEADS)
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
# Bits of a score: those of a digest above those of a position, so that no two are equal.
_SCORE_BITS, _POSITION_BITS = 13, 10


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: uint64, any shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest(token: int, position: int, salt: int, below: np.ndarray) -> np.ndarray:
    """What a token leaves over entries whose mixed digests sum up to `below`: [layers, heads]."""
    own = ((token * 1_000_003 + position) * 1_000_003 + salt) * 0x9E3779B1 & _MASK
    return mix(mix(np.uint64(own) + _LANES * _ODD) ^ below)


def scores(entries: np.ndarray) -> np.ndarray:
    """float32 [..., layers, heads] from entries [..., layers, heads, 2]; whole numbers."""
    bits = (entries[..., DIGEST] >> np.uint64(40)) & np.uint64((1 << _SCORE_BITS) - 1)
    return ((bits << np.uint64(_POSITION_BITS)) | entries[..., POSITION]).astype(np.float32)


class ByDigest(ScoringPolicy):
    """A policy whose scores follow from what is cached, in place of TriAttention's."""

    name = "triattention"

    def score(self, candidates: Candidates) -> Scores:
        keys, pages = candidates.keys, candidates.pages
        rows = torch.zeros(len(keys), pages.requests, keys.heads, pages.longest)
        for request in range(pages.requests):
            place = pages.rows(request)
            cached = torch.stack([layer[place] for layer in keys.layers]).numpy().view(np.uint64)
            found = torch.from_numpy(scores(cached))
            rows[:, request, :, : found.shape[1]] = found.transpose(1, 2)
        return Scores.of(rows, pages.counts())


def next_token(entry: np.ndarray, last: int, mark: Sequence[int]) -> int:
    """What greedy decoding would go on with."""
    drawn = int(mix(entry[..., DIGEST].sum(dtype=np.uint64)[None])[0])
    if len(mark) == 2 and last == THINK and drawn & 1:
        return DONE
    kind = (drawn >> 8) % 128
    if kind == 0:
        return EOS
    return THINK if kind < 10 and mark else 8 + (drawn >> 16) % 24


def in_order(entries: np.ndarray, parts: Iterable[tuple[int, int]]) -> np.ndarray:
    """`entries` with each of `parts`, [first, last), sorted by position in every head."""
    entries = entries.copy()
    for first, last in parts:
        part = entries[first:last]
        order = part[..., POSITION].argsort(0)
        entries[first:last] = np.take_along_axis(part, order[..., None], 0)
    return entries


@dataclass
class Region:
    """Entries of one request from `start` on, of which `kept` survive a round.

    Attributes:
        most: length that it never exceeds.
        due: length at its next round.
    """

    start: int
    kept: int
    most: int
    due: int
    evicted: int = 0


class Plain:
    """The entries of one request.

    Attributes:
        prompt: its prompt.
        wanted: what it was last prefilled with, prompt and what it had answered.
        tokens: those that left entries, whether these are still there or not.
        sampled: the token that goes on from them.
        entries: uint64 [length, layers, heads, 2]; sorted by position in every head.
        unordered: parts of `entries` that the cache may hold in another order.
        rounds, evicted, closed: totals of rounds, evicted tokens and regions closed by thinking.
        fresh: whether its last round came after its last token.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: KvPolicyConfig | None,
        extra_key: str | None,
        mark: Sequence[int],
        page_size: int,
    ) -> None:
        self.prompt = tuple(prompt)
        self.settings = settings
        self.extra_key = extra_key
        self.rounds = self.evicted = self.closed = 0
        self._mark = list(mark)
        self._page_size = page_size
        self._store = np.empty((LONGEST, LAYERS, HEADS, 2), np.uint64)
        self.clear()

    def clear(self) -> None:
        """Nothing is left of it."""
        self.wanted: tuple[int, ...] = ()
        self.tokens: list[int] = []
        self.sampled: int | None = None
        self.length = 0
        self.fresh = False
        self.unordered: list[tuple[int, int]] = []
        self.regions: list[Region] = []
        self._below = np.zeros((LAYERS, HEADS), np.uint64)

    @property
    def entries(self) -> np.ndarray:
        return self._store[: self.length]

    @property
    def delta(self) -> int:
        return len(self.tokens) - self.length

    @property
    def text(self) -> tuple[int, ...]:
        """All its tokens so far."""
        return (*self.tokens, self.sampled) if self.sampled is not None else tuple(self.tokens)

    @property
    def reusable(self) -> bool:
        """Whether it goes on from compressed history, and others from its own."""
        return self.settings is not None and self.settings.continues

    @property
    def compressed(self) -> list[Region]:
        return [region for region in self.regions if region.evicted]

    def loose_end(self, region: Region) -> int:
        """Behind what a compressed region keeps of its tokens but the most recent."""
        settings = self.settings
        assert settings is not None
        loose = max(self._page_size, self._whole(region.kept - settings.recent))
        return region.start + loose

    def begin(
        self,
        wanted: tuple[int, ...],
        found: int,
        entries: np.ndarray,
        unordered: list[tuple[int, int]],
    ) -> None:
        """Go on from `entries`, which the first `found` tokens of `wanted` left before."""
        self.wanted, self.tokens, self.unordered = wanted, list(wanted[:found]), unordered
        self.replace(0, entries)

    def resume(self, wanted: tuple[int, ...], slots: int) -> None:
        """Go on from the first `slots` of its own entries."""
        assert slots <= self.length
        self.tokens = self.tokens[: len(self.tokens) - (self.length - slots)]
        self.wanted, self.sampled = wanted, None
        self.replace(0, self._store[:slots].copy())

    def restart(self) -> None:
        """Nothing of it was found again: its rounds are run anew."""
        self.clear()
        self.rounds = self.evicted = self.closed = 0

    def expected(self, count: int) -> list[int]:
        """The next tokens to compute, `count` of what is prefilled or one that was sampled."""
        first = len(self.tokens)
        return list(self.wanted[first : first + count]) or [self.sampled or 0]

    def replace(self, first: int, entries: np.ndarray) -> None:
        """Let everything from `first` on be `entries`."""
        self.length = first + len(entries)
        self._store[first : self.length] = entries
        self._below = mix(self.entries[..., DIGEST]).sum(0, dtype=np.uint64)

    def feed(self, token: int) -> np.ndarray:
        """Compute one token over all entries; returns its own."""
        position = len(self.tokens)
        left = self._store[self.length]
        left[..., DIGEST] = digest(token, position, salt(self.extra_key), self._below)
        left[..., POSITION] = position
        self._below = self._below + mix(left[..., DIGEST])
        self.length += 1
        self.fresh = False
        self.tokens.append(token)
        self.sampled = next_token(left, token, self._mark)
        return left

    @property
    def due(self) -> bool:
        """Whether `plan` evicts, as far as lengths tell."""
        return bool(self.regions) and self.length == self.regions[-1].due

    def plan(self) -> None:
        """What is evicted before the next token of an answer is computed."""
        if self.settings is None:
            return
        if not self.regions:
            self._open(self.settings)
        elif self.reusable and len(self.tokens) == self._thought():
            self._open(self.settings)
            self.closed += 1
        if self.due:
            self._evict(self.settings, self.regions[-1])

    def _open(self, settings: KvPolicyConfig) -> None:
        start, kept = self._whole(self.length), self._whole(settings.budget)
        most = start + kept + self._whole(settings.interval)
        early = 0 if self.regions else self._early(settings)
        self.regions.append(Region(start, kept, most, most - early))

    def _early(self, settings: KvPolicyConfig) -> int:
        """Slots that the prompt's first round does not wait for, in pages."""
        page = self._page_size
        pages = (self._whole(settings.interval) - max(settings.recent, 1)) // page
        return zlib.crc32(np.array(self.prompt, np.int64)) % (1 + pages) * page

    def _whole(self, length: int) -> int:
        """Whole pages."""
        return -(-length // self._page_size) * self._page_size

    def _thought(self) -> int | None:
        """Position behind the first mark in the answer."""
        size = len(self._mark)
        for end in range(len(self.prompt) + size, len(self.text) + 1) if size else ():
            if list(self.text[end - size : end]) == self._mark:
                return end
        return None

    def _evict(self, settings: KvPolicyConfig, region: Region) -> None:
        candidates = self.entries[region.start :]
        chosen = _chosen(candidates, region.kept, settings)
        survivors = np.take_along_axis(candidates, chosen[..., None], 0)
        self.replace(region.start, survivors)
        region.due = region.most
        lost = len(candidates) - region.kept
        region.evicted += lost
        self.fresh = True
        self.rounds += 1
        self.evicted += lost
        loose = (region.start, region.start + region.kept - settings.recent)
        if settings.policy != "streaming" and loose not in self.unordered:
            self.unordered.append(loose)


def _chosen(candidates: np.ndarray, kept: int, settings: KvPolicyConfig) -> np.ndarray:
    """Indices of the survivors, ascending: int64 [kept, layers, heads]."""
    count = len(candidates)
    if settings.policy == "streaming":
        sinks = settings.sinks
        chosen = np.r_[:sinks, count - kept + sinks : count]
        return np.broadcast_to(chosen[:, None, None], (kept, LAYERS, HEADS))
    recent = settings.recent
    value = scores(candidates[: count - recent])
    if settings.eviction_mode == "per-head":
        value = np.broadcast_to(value.mean(1, keepdims=True), value.shape)
    elif settings.eviction_mode == "union":
        value = np.broadcast_to(value.max((1, 2), keepdims=True), value.shape)
    best = np.sort((-value).argsort(0)[: kept - recent], 0)
    tail = np.arange(count - recent, count)[:, None, None]
    return np.concatenate([best, np.broadcast_to(tail, (recent, LAYERS, HEADS))])
