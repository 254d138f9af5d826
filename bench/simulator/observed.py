"""What policies with live queries see of a request, beyond its candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Observed:
    """Resident tokens m of a request: the first `start` are beyond eviction, the rest candidates.

    Keys and queries are those that met in attention: after RoPE.
    """

    keys: torch.Tensor
    """[layers, kv heads, m, head_dim]."""
    queries: torch.Tensor
    """Of the last w tokens: [layers, query heads, w, head_dim]."""
    received: torch.Tensor
    """Attention that candidates were paid so far, over the group's heads: [layers, kv heads, n]."""
    resident: torch.Tensor
    """Whether there is a token at all: bool [layers, kv heads, m]."""
    start: int
    scaling: float
    """Of the logits: 1 / sqrt(head_dim)."""

    def logits(self, window: int) -> torch.Tensor:
        """Of the last `window` queries, causal: float64 [layers, kv heads, group, window, m].

        Raises ValueError where fewer queries are known.
        """
        if self.queries.shape[2] < window:
            raise ValueError(f"{self.queries.shape[2]} queries are known, the window is {window}")
        kv_heads, m = self.keys.shape[1:3]
        queries = self.queries[:, :, -window:].to(torch.float64)
        grouped = queries.unflatten(1, (kv_heads, -1))
        keys = self.keys.to(torch.float64)[:, :, None]
        logits = grouped @ keys.transpose(3, 4) * self.scaling
        causal = torch.ones(window, m, dtype=torch.bool).tril(m - window)
        visible = causal & self.resident[:, :, None, None]
        return logits.masked_fill(~visible, float("-inf"))
