"""How concentrated queries are: R_f = |E q_f| / E|q_f| of a frequency pair (arXiv 2604.04921)."""

from __future__ import annotations

import torch

STRONGEST = 3


def concentration(mean: torch.Tensor, abs_mean: torch.Tensor) -> torch.Tensor:
    """R of each pair; mean complex, abs_mean real, likewise shaped [..., pairs]."""
    return mean.abs() / abs_mean.clamp(min=1e-12)


def strongest(mean: torch.Tensor, abs_mean: torch.Tensor, count: int = STRONGEST) -> torch.Tensor:
    """Mean R over the `count` pairs of greatest E|q_f|: [...]."""
    best = abs_mean.topk(count, dim=-1).indices
    return concentration(mean, abs_mean).gather(-1, best).mean(dim=-1)
