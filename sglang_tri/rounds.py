"""When a request is due for a round, and what a round is. Lengths only, no device work.

Words: *logical* lengths count tokens, *physical* lengths count KV slots. A request's slots are its
prompt region [0, start), which is never touched, and its private region [start, physical).
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass, field

import torch

from sglang_tri.aliases import Alias, Lookup
from sglang_tri.config import KvPolicyConfig
from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages
from sglang_tri.spans import Chain


def ceil_to(length: int, page_size: int) -> int:
    """`length` rounded up to whole pages."""
    return -(-length // page_size) * page_size


def head_start(settings: KvPolicyConfig, prompt: array[int], page_size: int) -> int:
    """Slots by which a request's first round comes before its first private region is full.

    Requests that are admitted together would otherwise fall due in the same step, round after
    round. It depends on the prompt alone, so that a request gives the same output whatever runs
    beside it, and when it is prefilled anew. The first round evicts a page at least, and finds
    its most recent tokens behind the slots that survive.

    Args:
        settings: of the request.
        prompt: its token ids, int64.
        page_size: slots per page.

    Returns:
        Whole pages, at most ceil(interval) - recent slots.
    """
    most = ceil_to(settings.interval, page_size) - max(1, settings.recent)
    return zlib.crc32(prompt) % (most // page_size + 1) * page_size


@dataclass(slots=True)
class Region:
    """A private region of one request, from a prefill (or the end of thinking) on.

    Attributes:
        opened: slots in use when it was opened, [0, opened).
        start: first slot that may be evicted; `opened` rounded up to whole pages, because the
            last page belongs to what was there before.
        kept: slots that survive a round.
        limit: physical length that it never exceeds.
        before: logical minus physical length at its start.
        plain_tail: of the kept slots those at the end that hold the most recent tokens, the same
            in every head and in order.
        early: slots by which its next round comes before it is full.
        evicted: tokens evicted from it.
        positions: logical positions by slot, kept only while a trace is written.
    """

    opened: int
    start: int
    kept: int
    limit: int
    before: int
    plain_tail: int
    early: int = 0
    evicted: int = 0
    positions: torch.Tensor | None = None

    @classmethod
    def open(
        cls, settings: KvPolicyConfig, length: int, before: int, page_size: int, early: int = 0
    ) -> Region:
        """A region behind `length` slots, which hold `length + before` tokens."""
        start = ceil_to(length, page_size)
        kept = ceil_to(settings.budget, page_size)
        limit = start + kept + ceil_to(settings.interval, page_size)
        # A span has at least one slot: without one, nothing in the prefix cache would tell it.
        span = max(page_size, ceil_to(kept - settings.recent, page_size))
        return cls(length, start, kept, limit, before, kept - span, early)

    @property
    def due_at(self) -> int:
        """Physical length at which its next round is due."""
        return self.limit - self.early

    @property
    def candidates(self) -> int:
        """Slots of the private region when its next round is due."""
        return self.due_at - self.start

    @property
    def delta(self) -> int:
        """Logical minus physical length behind it."""
        return self.before + self.evicted

    @property
    def span(self) -> tuple[int, int, int, int]:
        """What was compressed: its logical start and end, its first slot and the one behind it."""
        last_slot = self.start + self.kept - self.plain_tail
        return self.start + self.before, last_slot + self.delta, self.start, last_slot

    def count_round(self) -> int:
        """Its round is planned; returns how many tokens it evicts."""
        evicted = self.candidates - self.kept
        self.evicted += evicted
        self.early = 0
        return evicted


@dataclass(slots=True)
class Suspended:
    """What a retracted request has left in the prefix cache, to go on from.

    Attributes:
        alias: its own compressed history.
        history: the compressed history that its prompt was found under.
        regions: its private regions.
    """

    alias: Alias
    history: Alias | None
    regions: list[Region]


@dataclass(slots=True, eq=False)
class RequestState:
    """What the policy knows of one request. `history` and `regions` last until its slots are
    released, the rest survives retraction.

    Two are never equal: clients choose ids, and may send one again.

    Attributes:
        rid: the request's id.
        settings: its settings.
        lookup: for finding compressed history.
        early: see `head_start`.
        rounds, evicted_tokens: totals.
        history: the compressed history that its prefix was found under.
        regions: its private regions; the last one is open.
        thinking: whether the end of thinking was not reached yet.
        think_end: logical position behind it, once it is known.
        scanned: output tokens in which it was looked for.
        uncounted: whether its admission still has to be counted.
        was_evicted_from: whether it ever was, also before it was prefilled anew.
        first_history: "exact" or "compressed", what its first prefill found.
        suspended: what it left when it was retracted, as long as it can be found.
        resumed: whether it is prefilled with tokens that it has generated itself.
    """

    rid: str
    settings: KvPolicyConfig
    lookup: Lookup
    early: int = 0
    rounds: int = 0
    evicted_tokens: int = 0
    history: Alias | None = None
    regions: list[Region] = field(default_factory=list)
    thinking: bool = True
    think_end: int | None = None
    scanned: int = 0
    uncounted: bool = True
    was_evicted_from: bool = False
    first_history: str = ""
    suspended: Suspended | None = None
    resumed: bool = False

    @property
    def chain(self) -> Chain:
        return self.history.chain if self.history else Chain()

    @property
    def takes_back(self) -> bool:
        """Whether the history that it was found under is what it left itself."""
        return self.suspended is not None and self.history is self.suspended.alias

    @property
    def delta(self) -> int:
        """Logical minus physical length."""
        return self.regions[-1].delta if self.regions else self.chain.delta

    def open_region(self, length: int, page_size: int) -> Region:
        """Nothing in the first `length` slots is evicted from now on."""
        early = 0 if self.regions else self.early
        self.regions.append(Region.open(self.settings, length, self.delta, page_size, early))
        return self.regions[-1]


@dataclass(slots=True)
class Due:
    """One request of a round.

    Attributes:
        state: its state.
        region: what is evicted from.
        row: its row of the request-to-slot table.
        candidates: slots of the private region in this round.
    """

    state: RequestState
    region: Region
    row: int
    candidates: int = field(init=False)

    def __post_init__(self) -> None:
        self.candidates = self.region.candidates


@dataclass(slots=True)
class Round:
    """A planned round of all due requests with equal settings.

    Attributes:
        settings: what they have in common.
        due: the requests.
        pages: their candidates, in slot order.
        budgets: how many each of them keeps.
        logical: int64 [requests], logical lengths.
        rows: int64 [requests], rows of the request-to-slot table.
        deltas: int64 [requests], logical minus physical length after the round.
    """

    settings: KvPolicyConfig
    due: list[Due]
    pages: Pages
    budgets: Budgets
    logical: torch.Tensor
    rows: torch.Tensor
    deltas: torch.Tensor


@dataclass(slots=True)
class Counters:
    """Totals of one server since its start."""

    rounds: int = 0
    evicted_tokens: int = 0
    freed_slots: int = 0
    requests_evicted: int = 0
    requests_refused: int = 0
    resident_generated_max: int = 0

    def saw_resident(self, slots: int) -> None:
        self.resident_generated_max = max(self.resident_generated_max, slots)
