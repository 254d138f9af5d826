"""The KV lists of a conversation in all layers, and where they may be cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .cache import LayerCache


@dataclass
class History:
    """What is resident of `length` logical tokens; grows, shrinks in rounds, can be cut back."""

    cache: list[LayerCache]
    """One entry a layer, all of equal length."""
    length: int = 0
    """Logical length t."""
    spans: dict[int, int] = field(default_factory=dict)
    """Compressed spans of logical positions, from a region's begin to the end of what was evicted
    in any layer and head."""

    @property
    def physical(self) -> int:
        """Resident tokens of a head."""
        return len(self.cache[0])

    @property
    def delta(self) -> int:
        """Evicted tokens of a head."""
        return self.length - self.physical

    def fork(self) -> History:
        """A copy that shares the tensors."""
        return replace(self, cache=[replace(kv) for kv in self.cache])

    def keep(self, start: int, begin: int, index: torch.Tensor) -> None:
        """Drop from list place `start` on all but those at start + index.

        begin: the logical position at which the region of these tokens begins;
        index: int64 [layers, kv heads, k].
        """
        for kv, own in zip(self.cache, index, strict=True):
            kv.keep(start, own)
        self.spans = {**self.spans, begin: self.length - self._complete_tail()}

    def truncate(self, length: int) -> None:
        """Forget the tokens from logical position `length` on.

        Raises ValueError where that would leave part of a compressed span.
        """
        for begin, end in self.spans.items():
            if begin < length < end:
                raise ValueError(f"cut at {length} in compressed tokens {begin} to {end}")
        for kv in self.cache:
            kv.truncate(length)
        self.spans = {begin: end for begin, end in self.spans.items() if end <= length}
        self.length = length

    def _complete_tail(self) -> int:
        """How many of the last logical tokens are resident in every layer and head."""
        complete = torch.arange(self.physical) + self.delta
        tails = [(kv.positions == complete).sum(dim=1) for kv in self.cache]
        return int(torch.stack(tails).min())
