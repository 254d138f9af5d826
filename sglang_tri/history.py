"""Compressed history: tokens of a conversation that lie in fewer slots than there are tokens.

A prefix cache maps token ids to slots, one slot per id. A *span* is a stretch of tokens that was
evicted from; its slots enter the cache under as many *synthetic* ids, which no vocabulary has and
which are never used again. A *chain* holds the spans of one history, and turns its tokens into the
ids that the cache knows. An *alias* finds a chain again, from the tokens that made it.

Nothing here knows any KV. Whether the prefix cache still holds a chain is for the cache to say: its
synthetic ids are found there or not, and nothing else is ever found under them.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Above every vocabulary. The low bits count a span's slots: none has 16 million of them.
SYNTHETIC = 1 << 40
SLOT_BITS = 24
# Tokens per hash. Aliases that end in the same block are told apart token by token.
BLOCK = 64


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a history, in the slots [first_slot, last_slot) of its row.

    Attributes:
        number: its own among all spans of the server.
        start, end: logical positions.
        first_slot, last_slot: physical positions.
    """

    number: int
    start: int
    end: int
    first_slot: int
    last_slot: int

    @property
    def slots(self) -> int:
        return self.last_slot - self.first_slot

    @property
    def evicted(self) -> int:
        """Tokens without a slot."""
        return (self.end - self.start) - self.slots

    @cached_property
    def ids(self) -> array[int]:
        """Its synthetic ids, one for each slot."""
        first = SYNTHETIC + (self.number << SLOT_BITS)
        return array("q", range(first, first + self.slots))


@dataclass(frozen=True)
class Chain:
    """The spans of one history, in order; everything between and behind them is plain."""

    spans: tuple[Span, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.spans)

    def then(self, span: Span) -> Chain:
        """This history with `span` behind it."""
        return Chain((*self.spans, span))

    @cached_property
    def delta(self) -> int:
        """Logical minus physical length behind the last span."""
        return sum(span.evicted for span in self.spans)

    @property
    def end(self) -> int:
        """Logical position behind the last span."""
        return self.spans[-1].end if self.spans else 0

    @property
    def last_slot(self) -> int:
        """Physical position behind the last span."""
        return self.spans[-1].last_slot if self.spans else 0

    def physical_length(self, tokens: int) -> int:
        """Slots of the first `tokens` tokens, which do not end inside a span."""
        return tokens - sum(span.evicted for span in self.spans if span.end <= tokens)

    def physical_ids(self, tokens: array[int]) -> array[int]:
        """The ids that the prefix cache knows `tokens` by: synthetic ones in place of spans."""
        ids, position = array("q"), 0
        for span in self.spans:
            ids += tokens[position : span.start]
            ids += span.ids
            position = span.end
        ids += tokens[position:]
        return ids


def span_number(ids: np.ndarray) -> np.ndarray:
    """The spans that synthetic ids belong to: int64, any shape."""
    numbers: np.ndarray = (ids - SYNTHETIC) >> SLOT_BITS
    return numbers


class Lookup:
    """What was worked out for one growing token sequence, so that nothing is done twice.

    Attributes:
        scope: what else must be equal for two sequences to share history.
        verified: numbers of spans that its tokens were compared with.
    """

    def __init__(self, scope: Hashable) -> None:
        self.scope = scope
        self.verified: set[int] = set()
        self._hashes = [self.block_hash(scope)]

    @staticmethod
    def block_hash(content: Hashable) -> int:
        """Of a block and of the hash of all before it; two may have the same."""
        return hash(content)

    def hashes(self, tokens: array[int]) -> Sequence[int]:
        """Rolling hashes of the first 0, 1, 2, ... whole blocks of `tokens`."""
        for block in range(len(self._hashes) - 1, len(tokens) // BLOCK):
            content = tokens[block * BLOCK : (block + 1) * BLOCK].tobytes()
            self._hashes.append(self.block_hash((self._hashes[-1], content)))
        return self._hashes


@dataclass(frozen=True, eq=False)
class Alias:
    """A history that ends with a compressed span.

    Attributes:
        scope: as in `Lookup`.
        chain: its spans; the last one is its own.
        parent: the history up to the span before, which holds the tokens up to there.
        tokens: the tokens from there to the end of its own span.
        bucket: hash of its whole blocks.
    """

    scope: Hashable
    chain: Chain
    parent: Alias | None
    tokens: array[int]
    bucket: int

    @property
    def span(self) -> Span:
        return self.chain.spans[-1]

    def covers(self, scope: Hashable, tokens: array[int]) -> bool:
        """Whether `tokens` begin with this history, compared token by token."""
        if self.scope != scope:
            return False
        alias: Alias | None = self
        while alias is not None:
            start = alias.chain.end - len(alias.tokens)
            if tokens[start : alias.chain.end] != alias.tokens:
                return False
            alias = alias.parent
        return True


class AliasStore:
    """All aliases of one server, least recently used first.

    Args:
        limit: most aliases that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._aliases: OrderedDict[int, Alias] = OrderedDict()
        self._buckets: dict[int, list[Alias]] = {}
        self._spans = 0
        self.lookups = 0
        self.hits = 0
        self.stale = 0

    def __len__(self) -> int:
        return len(self._aliases)

    def __contains__(self, alias: Alias) -> bool:
        return self._aliases.get(alias.span.number) is alias

    def new_span(self, start: int, end: int, first_slot: int, last_slot: int) -> Span:
        """A span with ids that were never used before; see `Span`."""
        self._spans += 1
        return Span(self._spans, start, end, first_slot, last_slot)

    def extend(self, chain: Chain, stretches: Iterable[tuple[int, int, int, int]]) -> Chain:
        """`chain` with a new span behind it for each of `stretches`, see `new_span`."""
        for stretch in stretches:
            chain = chain.then(self.new_span(*stretch))
        return chain

    def remember(
        self, lookup: Lookup, tokens: array[int], chain: Chain, known: Alias | None, slots: int
    ) -> Alias | None:
        """The prefix cache holds the first `slots` slots of `chain`: make them known.

        Args:
            tokens: all of the request's.
            known: the history that it was found under, the first spans of `chain`.

        Returns:
            The alias of all of `chain`, or None if the cache does not hold all of it.
        """
        found = len(known.chain.spans) if known else 0
        for last in range(found, len(chain.spans)):
            if chain.spans[last].last_slot <= slots:
                known = self.add(lookup, tokens, Chain(chain.spans[: last + 1]), known)
        return known if known is not None and known.chain == chain else None

    def add(self, lookup: Lookup, tokens: array[int], chain: Chain, parent: Alias | None) -> Alias:
        """Remember that `tokens`, cut off at the end of `chain`, lie in the slots of `chain`.

        A history that is there already is replaced. Over the limit, the least recently used goes.
        """
        begin = parent.chain.end if parent else 0
        bucket = lookup.hashes(tokens)[chain.end // BLOCK]
        for known in list(self._buckets.get(bucket, ())):
            if known.chain.end == chain.end and known.covers(lookup.scope, tokens):
                self.drop(known)
        alias = Alias(lookup.scope, chain, parent, tokens[begin : chain.end], bucket)
        self._aliases[alias.span.number] = alias
        self._buckets.setdefault(bucket, []).append(alias)
        if len(self._aliases) > self._limit:
            self.drop(next(iter(self._aliases.values())))
        return alias

    def find(self, lookup: Lookup, tokens: array[int]) -> Iterator[Alias]:
        """Histories that `tokens` go on from, by at least one token; the longest first."""
        if not self._aliases:
            return
        # Hashes that collide name a bucket more than once.
        for bucket in dict.fromkeys(reversed(lookup.hashes(tokens))):
            ending_here = self._buckets.get(bucket, ())
            for alias in sorted(ending_here, key=lambda alias: -alias.chain.end):
                if alias.chain.end < len(tokens) and _verify(alias, lookup, tokens):
                    yield alias

    def touch(self, alias: Alias) -> None:
        """`alias` was used, and with it the history that it goes on from."""
        for span in reversed(alias.chain.spans):
            if span.number in self._aliases:
                self._aliases.move_to_end(span.number)

    def drop(self, alias: Alias) -> None:
        """Forget one alias, if it is still there."""
        if self._aliases.pop(alias.span.number, None) is None:
            return
        remaining = self._buckets[alias.bucket]
        remaining.remove(alias)
        if not remaining:
            del self._buckets[alias.bucket]

    def drop_ids(self, ids: array[int]) -> None:
        """The prefix cache no longer holds `ids`: forget the aliases whose spans are among them."""
        if not self._aliases:
            return
        found = np.frombuffer(ids, dtype=np.int64)
        for number in np.unique(span_number(found[found >= SYNTHETIC])).tolist():
            if number in self._aliases:
                self.drop(self._aliases[number])

    def clear(self) -> None:
        """Forget all aliases; ids are not used again all the same."""
        self._aliases.clear()
        self._buckets.clear()

    def report(self) -> dict[str, int]:
        """Counters, for `/server_info`."""
        return {
            "alias_lookups": self.lookups,
            "alias_hits": self.hits,
            "alias_stale": self.stale,
            "live_spans": len(self._aliases),
            "span_slots": sum(alias.span.slots for alias in self._aliases.values()),
        }


def _verify(alias: Alias, lookup: Lookup, tokens: array[int]) -> bool:
    if alias.span.number not in lookup.verified:
        if not alias.covers(lookup.scope, tokens):
            return False
        lookup.verified.add(alias.span.number)
    return True
