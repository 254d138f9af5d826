"""The one owner of a request's state: events change it, questions only read it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_tri.history import Alias, AliasStore, Chain, Lookup
from sglang_tri.request.region import Region, ceil_to, slots_for, stagger_slots

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig

EXACT, COMPRESSED = "exact", "compressed"


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """What a retracted request has left in the prefix cache, to go on from.

    Attributes:
        alias: its own compressed history.
        history: the compressed history that its prompt was found under.
        regions: its private regions.
    """

    alias: Alias
    history: Alias | None
    regions: list[Region]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """What the policy knows of one request.

    Its events, in the order of a life: `queued`; `rematching` and `matched`, as often as its prefix
    is looked up; `prefilled`; `decoded` before each token; `evicted` with each round; `finished`.
    One that was `retracted` is matched again and resumes: what it left is its own again, or its
    tokens are prefilled in chunks with the rounds between them that decoding had (`chunked`), so
    that it reads what it read before, and never holds more than prompt, budget and interval (twice
    budget and interval if it thinks).

    `history` and `regions` last until its slots are released, the rest survives retraction. Two
    requests are never equal: clients choose ids, and may send one again.

    Attributes:
        rid: the request's id.
        settings: its settings.
        lookup: for finding compressed history.
        prompt_length: tokens of its prompt.
        page_size: slots per page.
        think_mark: token ids that end its thinking, or none if that closes no region.
        stagger: see `stagger_slots`.
        rounds, evicted_tokens: totals.
        history: the compressed history that its prefix was found under.
        regions: its private regions; the last one is open.
        first_history: `EXACT` or `COMPRESSED`, what its first prefill found.
        admitted: whether a prefill was prepared since its prefix was looked up.
        was_evicted_from: whether it ever was, also before it was prefilled anew.
        left: what it left when it was retracted, as long as it can be found.
        resumed: whether it is prefilled with tokens that it has generated itself.
        thinking: whether the end of thinking was not reached yet.
        think_end: logical position behind it, once it is known.
        scanned: output tokens in which it was looked for.
    """

    rid: str
    settings: KvPolicyConfig
    lookup: Lookup
    prompt_length: int
    page_size: int = 1
    think_mark: array[int] = field(default_factory=lambda: array("q"))
    stagger: int = 0
    rounds: int = 0
    evicted_tokens: int = 0
    history: Alias | None = None
    regions: list[Region] = field(default_factory=list)
    first_history: str = ""
    admitted: bool = False
    was_evicted_from: bool = False
    left: LeftBehind | None = None
    resumed: bool = False
    thinking: bool = field(init=False)
    think_end: int | None = None
    scanned: int = 0

    @classmethod
    def queued(
        cls,
        rid: str,
        prompt: array[int],
        settings: KvPolicyConfig,
        page_size: int,
        think_mark: array[int],
        scope: str | None = None,
    ) -> Request:
        """A request has come.

        Args:
            prompt: its token ids, int64.
            scope: what keeps its prefixes apart from others' (salt, key, adapter).
        """
        stagger = stagger_slots(settings, prompt, page_size)
        lookup = Lookup((settings, scope))
        # What nobody goes on from later need not be told apart from the answer.
        mark = think_mark if settings.continues else array("q")
        return cls(rid, settings, lookup, len(prompt), page_size, mark, stagger)

    def __post_init__(self) -> None:
        self.thinking = bool(self.think_mark)

    # Questions.

    @property
    def chain(self) -> Chain:
        """The spans that its prefix was found under."""
        return self.history.chain if self.history else Chain()

    @property
    def delta(self) -> int:
        """Logical minus physical length."""
        if self.regions:
            return self.regions[-1].delta
        return self.history.chain.delta if self.history else 0

    @property
    def compressed(self) -> list[Region]:
        """The regions that were evicted from."""
        return [region for region in self.regions if region.evicted]

    @property
    def found_own(self) -> bool:
        """Whether the history that it was found under is what it left itself."""
        return self.history is not None and self.is_own(self.history)

    def is_own(self, alias: Alias) -> bool:
        """Whether `alias` is what it left itself."""
        return self.left is not None and alias is self.left.alias

    @property
    def stays_out_of_tree(self) -> bool:
        """Whether what is prefilled belongs to it alone."""
        return self.resumed and bool(self.regions)

    def histories(self, aliases: AliasStore, tokens: array[int]) -> Iterator[Alias]:
        """Compressed histories that it may go on from: its own, then the longest first.

        What a resumed request has generated is its own again: it looks for its prompt, or for all
        that it left itself.
        """
        own = self.left.alias if self.left else None
        if own is not None and own in aliases and own.chain.end < len(tokens):
            yield own
        most = self.prompt_length if self.resumed else len(tokens)
        for alias in aliases.find(self.lookup, tokens):
            if alias.chain.end < most:
                yield alias

    def is_due(self, length: int) -> bool:
        """Whether a round is due at a physical length."""
        return length >= self.regions[-1].due_at

    def resident(self, length: int) -> int:
        """Of `length` slots those behind what it was admitted with."""
        return length - self.regions[0].opened if self.regions else 0

    def slots_to_come(self, length: int, tokens: int) -> int:
        """Slots that it takes on top of `length` at the most, or until its thinking ends.

        Args:
            tokens: output tokens that are still to come, at the most.
        """
        if not self.regions:
            return slots_for(self.settings, tokens, self.page_size)
        return min(ceil_to(tokens, self.page_size), max(0, self.regions[-1].limit - length))

    def tokens_until_round(self, length: int) -> int | None:
        """Tokens until the next round, or the prompt's end, of a resumed request with `length`
        slots; None where it is prefilled at once, behind what it left.
        """
        if self.found_own:
            return None
        region = self._last_region()
        in_prompt = not self.regions and length < region.start
        return (region.start if in_prompt else region.due_at) - length

    def most_slots(self, output: array[int]) -> int:
        """Physical length that a resumed request does not exceed before it decodes."""
        region = self._last_region()
        thinks = not self.found_own and (self.thinking or not self.regions)
        if thinks and self._end_of_thinking(output) is not None:
            return region.limit + region.limit - region.start
        return region.limit

    def report(self, length: int) -> dict[str, Any]:
        """Plain values for `meta_info` of a request that ends with `length` slots."""
        return {
            "history": self.first_history,
            "rounds": self.rounds,
            "evicted_tokens": self.evicted_tokens,
            "resident_slots": length,
        }

    def _last_region(self) -> Region:
        """The region that a resumed request will be in, or is in."""
        regions = self.left.regions if self.left is not None and self.found_own else self.regions
        return regions[-1] if regions else self._first_region()

    def _first_region(self) -> Region:
        """The region behind the prompt, where the slots hold nothing behind it yet."""
        chain = self.chain
        length = chain.physical_length(self.prompt_length)
        return Region.open(self.settings, length, chain.delta, self.page_size, self.stagger)

    def _end_of_thinking(self, output: array[int]) -> int | None:
        """Logical position behind the end of thinking; None where there is none, or not yet."""
        if self.think_end is not None or not self.think_mark:
            return self.think_end
        end = _end_of(self.think_mark, output, self.scanned)
        return None if end is None else self.prompt_length + end

    # Events.

    def rematching(self) -> None:
        """The prefix found so far is not used: it is looked up anew."""
        self.history = None
        self.admitted = False

    def matched(self, alias: Alias | None) -> None:
        """The prefix cache holds the history `alias`, or none that is compressed."""
        self.history = alias
        if not self.found_own:
            self.left = None

    def prefilled(self, length: int, output: array[int], detached: bool = False) -> None:
        """A prefill is prepared, behind which `length` slots are in use.

        Args:
            output: output tokens that it has generated before.
            detached: whether what it left and found is its own again.
        """
        self.admitted = True
        self.first_history = self.first_history or (COMPRESSED if self.history else EXACT)
        if self.left is not None and self.found_own:
            if detached:
                self.history, self.regions = self.left.history, self.left.regions
            # Others go on from it otherwise: it stays as it is, like a prompt.
            self.resumed, self.left = detached, None
        elif self.resumed and not self.regions:
            self._start_over(length, output)

    def chunked(self, output: array[int]) -> None:
        """A round between two chunks of a resumed request is planned."""
        self._close_thinking(output)

    def decoded(self, length: int, output: array[int]) -> None:
        """`length` slots hold all but the next token.

        A region opens behind the prompt, and behind the end of thinking.
        """
        if not self.regions or (self.thinking and self._ends_thinking(length, output)):
            self._open_region(length)

    def evicted(self) -> int:
        """A round is planned; returns how many tokens it evicts."""
        evicted = self.regions[-1].evict()
        self.was_evicted_from = True
        self.rounds += 1
        self.evicted_tokens += evicted
        return evicted

    def retracted(self, length: int, output: array[int], alias: Alias | None) -> None:
        """Its `length` slots are released before it has finished, and not between its chunks.

        Args:
            output: output tokens that it has generated.
            alias: its own compressed history, if the prefix cache holds all of it.
        """
        # A round that is due already would come between what it left and its last token.
        if alias is not None and self.compressed and not self.is_due(length):
            self.left = LeftBehind(alias, self.history, self.regions)
        self.finished()
        self.resumed = bool(output)

    def finished(self) -> None:
        """Its slots are released."""
        self.history, self.regions, self.resumed = None, [], False

    def _start_over(self, length: int, output: array[int]) -> None:
        self.rounds = self.evicted_tokens = 0
        self.thinking = bool(self.think_mark)
        region = self._first_region()
        if length > region.opened:
            self.regions.append(region)
            self._close_thinking(output)

    def _close_thinking(self, output: array[int]) -> None:
        """Open the region behind the end of thinking, where the last one is not due before that."""
        end = self._scan(output)
        if self.thinking and end is not None and end - self.delta <= self.regions[-1].due_at:
            self.thinking = False
            self._open_region(end - self.delta)

    def _open_region(self, length: int) -> None:
        """Nothing in the first `length` slots is evicted from now on."""
        stagger = 0 if self.regions else self.stagger
        region = Region.open(self.settings, length, self.delta, self.page_size, stagger)
        self.regions.append(region)

    def _ends_thinking(self, length: int, output: array[int]) -> bool:
        """Whether the last of `length` slots holds the end of thinking."""
        end = self._scan(output)
        if end is None:
            return False
        self.thinking = length + self.delta < end
        return length + self.delta == end

    def _scan(self, output: array[int]) -> int | None:
        """As `_end_of_thinking`; what was scanned is not scanned again."""
        self.think_end = self._end_of_thinking(output)
        self.scanned = len(output)
        return self.think_end


def _end_of(mark: array[int], output: array[int], scanned: int) -> int | None:
    """Output tokens up to the end of the first `mark` that ends behind the first `scanned`."""
    for end in range(max(len(mark), scanned + 1), len(output) + 1):
        if output[end - len(mark) : end] == mark:
            return end
    return None
