"""Scores of candidates, as the score kernel leaves them for selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Partial moments of each row: the candidates of a row are split into so many stretches.
SPLITS = 8
# Added to a deviation before it divides.
EPSILON = 1e-6


@dataclass(frozen=True)
class Scores:
    """Scores of every candidate, and the moments of each query head's row.

    A score that is not finite counts as the lowest, and is left out of the moments.

    Attributes:
        rows: float32 [layers, requests, query_heads, longest]; what lies behind a request's
            candidates is not defined. Not finite only as -inf.
        moments: float32 [3, layers, requests, query_heads, SPLITS]: of each stretch the number of
            finite scores, their mean, and the sum of squared distances from it.
    """

    rows: torch.Tensor
    moments: torch.Tensor

    @property
    def layers(self) -> int:
        return self.rows.shape[0]

    @property
    def heads(self) -> int:
        return self.rows.shape[2]

    @property
    def longest(self) -> int:
        return self.rows.shape[3]

    @classmethod
    def of(cls, rows: torch.Tensor, counts: torch.Tensor) -> Scores:
        """Scores that another program computed.

        Args:
            rows: float32 [layers, requests, query_heads, longest].
            counts: int64 [requests], candidates of each request.
        """
        inside = torch.arange(rows.shape[3], device=rows.device) < counts[:, None]
        valid = rows.isfinite() & inside[None, :, None]
        count = valid.sum(-1)
        mean = rows.where(valid, 0).sum(-1) / count.clamp(min=1)
        squares = (rows - mean[..., None]).where(valid, 0).square().sum(-1)
        moments = rows.new_zeros(3, *rows.shape[:3], SPLITS)
        moments[..., 0] = torch.stack([count.to(rows.dtype), mean, squares])
        return cls(rows.where(rows.isfinite(), -torch.inf).contiguous(), moments)

    def mean_and_deviation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row: float32 [layers, requests, query_heads] both, population deviation."""
        count, mean, squares = self.moments
        total = count.sum(-1).clamp(min=1)
        centre = (count * mean).sum(-1) / total
        spread = squares + count * (mean - centre[..., None]).square()
        return centre, (spread.sum(-1) / total).sqrt()
