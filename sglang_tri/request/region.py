"""The slots of a request that may be evicted from, and how many they come to. Lengths only.

Words: *logical* lengths count tokens, *physical* lengths count KV slots. A request's slots are its
prompt region [0, start), which is never touched, and its private region [start, physical).
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig


def ceil_to(length: int, page_size: int) -> int:
    """`length` rounded up to whole pages."""
    return -(-length // page_size) * page_size


def stagger_slots(settings: KvPolicyConfig, prompt: array[int], page_size: int) -> int:
    """Slots by which a request's first round comes before its first region is full.

    Requests that are admitted together would otherwise fall due in the same step, round after
    round. First rounds are staggered by a hash of the prompt alone, so that a request gives the
    same output whatever runs beside it, and when it is prefilled anew. The first round evicts a
    page at least, and finds its most recent tokens behind the slots that survive.

    Args:
        settings: of the request.
        prompt: its token ids, int64.
        page_size: slots per page.

    Returns:
        Whole pages, at most ceil(interval) - recent slots.
    """
    most = ceil_to(settings.interval, page_size) - max(1, settings.recent)
    return zlib.crc32(prompt) % (most // page_size + 1) * page_size


def slots_for(settings: KvPolicyConfig, tokens: int, page_size: int, regions: int = 1) -> int:
    """Slots that hold the next `tokens` output tokens of a request at any time, in whole pages.

    Args:
        settings: of the request.
        tokens: output tokens.
        page_size: slots per page.
        regions: private regions with a budget of their own: two where the end of thinking closes
            the first.
    """
    region = ceil_to(settings.budget, page_size) + ceil_to(settings.interval, page_size)
    return min(ceil_to(tokens, page_size), regions * region)


@dataclass(slots=True)
class Region:
    """A private region of one request, from a prefill (or the end of thinking) on.

    Attributes:
        opened: slots in use when it was opened, [0, opened).
        start: first slot that may be evicted; `opened` rounded up to whole pages, because the
            last page belongs to what was there before.
        kept: slots that survive a round.
        limit: physical length that it never exceeds.
        delta_at_start: logical minus physical length at its start.
        verbatim_tail: of the kept slots those at the end that hold the most recent tokens, the
            same in every head and in order.
        stagger: slots by which its next round comes before it is full.
        evicted: tokens evicted from it.
    """

    opened: int
    start: int
    kept: int
    limit: int
    delta_at_start: int
    verbatim_tail: int
    stagger: int = 0
    evicted: int = 0

    @classmethod
    def open(
        cls, settings: KvPolicyConfig, length: int, delta: int, page_size: int, stagger: int = 0
    ) -> Region:
        """A region behind `length` slots, which hold `length + delta` tokens."""
        start = ceil_to(length, page_size)
        kept = ceil_to(settings.budget, page_size)
        limit = start + kept + ceil_to(settings.interval, page_size)
        # A span has at least one slot: without one, nothing in the prefix cache would tell it.
        span = max(page_size, ceil_to(kept - settings.recent, page_size))
        return cls(length, start, kept, limit, delta, kept - span, stagger)

    @property
    def due_at(self) -> int:
        """Physical length at which its next round is due."""
        return self.limit - self.stagger

    @property
    def delta(self) -> int:
        """Logical minus physical length behind it."""
        return self.delta_at_start + self.evicted

    @property
    def span(self) -> tuple[int, int, int, int]:
        """What was compressed: its logical start and end, its first slot and the one behind it."""
        last_slot = self.start + self.kept - self.verbatim_tail
        return self.start + self.delta_at_start, last_slot + self.delta, self.start, last_slot

    def evict(self) -> int:
        """Its round is planned; returns how many tokens it evicts."""
        evicted = self.due_at - self.start - self.kept
        self.evicted += evicted
        self.stagger = 0
        return evicted
