"""Compressed history: which tokens of a conversation lie in fewer slots than there are tokens.

A prefix cache maps token ids to slots, one slot per id. A *span* is a stretch of tokens that was
evicted from; its slots enter the cache under as many *synthetic* ids, which no vocabulary has and
which are never used again. A *chain* holds the spans of one history, and turns its tokens into the
ids that the cache knows.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Above every vocabulary. The low bits count a span's slots: none has 16 million of them.
SYNTHETIC = 1 << 40
SLOT_BITS = 24


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

    def then(self, *spans: Span) -> Chain:
        """This history with `spans` behind it."""
        return Chain(self.spans + spans)

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
