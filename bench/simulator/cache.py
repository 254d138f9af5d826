"""The KV lists of one conversation in one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

WINDOW = 64
"""Queries that are remembered."""
VACANT = -1


@dataclass
class LayerCache:
    """Per KV head the list of resident tokens, in logical order.

    All heads hold equally many tokens m, but after a round with sets of their own not the same.
    Tensors are replaced, never written to, so a shallow copy is a copy.
    """

    keys: torch.Tensor
    """Before RoPE: [kv heads, m, head_dim]."""
    rotated: torch.Tensor
    """The same keys after RoPE at their logical positions: [kv heads, m, head_dim]."""
    values: torch.Tensor
    """[kv heads, m, head_dim]."""
    positions: torch.Tensor
    """Logical positions: int64 [kv heads, m], ascending; VACANT where a head has no token."""
    received: torch.Tensor
    """Attention that each token was paid so far, summed over queries and heads: [kv heads, m]."""
    queries: torch.Tensor
    """Of the last tokens, at most WINDOW, after RoPE: [query heads, tokens, head_dim]."""

    @classmethod
    def empty(cls, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Self:
        """A cache without tokens."""
        nothing = torch.empty(kv_heads, 0, head_dim, dtype=dtype)
        places = torch.empty(kv_heads, 0, dtype=torch.int64)
        queries = torch.empty(heads, 0, head_dim, dtype=dtype)
        return cls(nothing, nothing, nothing, places, nothing[..., 0], queries)

    def __len__(self) -> int:
        return self.positions.shape[1]

    def append(
        self,
        keys: torch.Tensor,
        rotated: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Add tokens to every head: [kv heads, tokens, head_dim], positions int64 [tokens]."""
        self.keys = torch.cat([self.keys, keys], dim=1)
        self.rotated = torch.cat([self.rotated, rotated], dim=1)
        self.values = torch.cat([self.values, values], dim=1)
        spread = positions.expand(self.positions.shape[0], -1)
        self.positions = torch.cat([self.positions, spread], dim=1)
        new = torch.zeros(len(spread), len(positions), dtype=self.received.dtype)
        self.received = torch.cat([self.received, new], dim=1)

    def observe(self, queries: torch.Tensor, weights: torch.Tensor) -> None:
        """Note the last tokens' queries [query heads, tokens, head_dim], after RoPE.

        weights: the attention that they pay: [kv heads, group, tokens, m].
        """
        self.queries = torch.cat([self.queries, queries], dim=1)[:, -WINDOW:]
        self.received = self.received + weights.sum(dim=(1, 2))

    def keep(self, start: int, index: torch.Tensor) -> None:
        """Drop from list place `start` on all but those at start + index: int64 [kv heads, k].

        An index of -1 makes a place without a token, for a head that keeps fewer than another.
        """
        heads = self.positions.shape[0]
        places = torch.cat([torch.arange(start).expand(heads, -1), index + start], dim=1)
        vacant = torch.cat([torch.zeros(heads, start, dtype=torch.bool), index < 0], dim=1)
        rows = torch.arange(heads)[:, None]
        self.keys = self.keys[rows, places]
        self.rotated = self.rotated[rows, places]
        self.values = self.values[rows, places]
        self.positions = self.positions[rows, places].masked_fill(vacant, VACANT)
        self.received = self.received[rows, places]

    def truncate(self, length: int) -> None:
        """Drop logical positions from `length` on; every head must hold equally many below."""
        size = int((self.positions[0] < length).sum())
        self.keys = self.keys[:, :size]
        self.rotated = self.rotated[:, :size]
        self.values = self.values[:, :size]
        self.positions = self.positions[:, :size]
        self.received = self.received[:, :size]
        self.queries = self.queries[:, :0]
