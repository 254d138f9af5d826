"""What statistics say about a model: concentration, strongest frequencies, preferred distances.

R, the mean resultant length of directional statistics, is |E q| / E|q|: 1 where every query points
the same way, near 0 where directions cancel (arXiv 2604.04921 calls it Q/K concentration).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics

STRONGEST = 3
CONCENTRATED = 0.95


@dataclass(frozen=True)
class Concentration:
    """R of every head, in several readings; float32 [layers, query_heads] each.

    Attributes:
        strongest: mean over the three frequency pairs with the largest |E q_f|, as published.
        amplitude: over all pairs, weighted by E|q_f|.
        energy: over all pairs, weighted by (E|q_f|)^2.
        full: |E q| / E|q| of whole heads, or None where the file does not have it.
    """

    strongest: torch.Tensor
    amplitude: torch.Tensor
    energy: torch.Tensor
    full: torch.Tensor | None


def concentration(statistics: Statistics) -> Concentration:
    centre, size = statistics.q_mean.abs(), statistics.q_abs
    resultant = torch.where(size > 0, centre / size, 0.0)
    norm = statistics.q_norm
    return Concentration(
        strongest=resultant.gather(-1, strongest_pairs(statistics)).mean(-1),
        amplitude=centre.sum(-1) / size.sum(-1),
        energy=(centre * size).sum(-1) / size.square().sum(-1),
        full=None if norm is None else torch.linalg.vector_norm(centre, dim=-1) / norm,
    )


def strongest_pairs(statistics: Statistics, count: int = STRONGEST) -> torch.Tensor:
    """int64 [layers, query_heads, count]: frequency pairs with the largest |E q_f|, in order."""
    return statistics.q_mean.abs().topk(min(count, statistics.q_mean.shape[-1]), dim=-1).indices


def centre_products(statistics: Statistics) -> torch.Tensor:
    """complex64 [layers, query_heads, head_dim / 2]: E[q_f] conj(E[k_f]).

    Where a file has no keys, each component of the mean key counts as 1: the curve is then that of
    the score's answer to such a key, and says where it oscillates, not where attention peaks.
    """
    if statistics.k_mean is None:
        return statistics.q_mean
    group = statistics.q_mean.shape[1] // statistics.k_mean.shape[1]
    return statistics.q_mean * statistics.k_mean.repeat_interleave(group, dim=1).conj()


def distance_curve(products: torch.Tensor, rope: Rope, distances: torch.Tensor) -> torch.Tensor:
    """The trigonometric series: expected attention logits by distance (arXiv 2604.04921).

    Args:
        products: complex [..., head_dim / 2], see `centre_products`.
        distances: int64 [n], query position minus key position.

    Returns:
        float32 [..., n], before the softmax scale.
    """
    phase = torch.remainder(distances[:, None] * rope.padded_frequencies(), 2 * torch.pi)
    scaled = products.cpu() * rope.padded_factors().float().square()
    return scaled.real @ phase.cos().float().T - scaled.imag @ phase.sin().float().T


def preferred_distances(statistics: Statistics, rope: Rope, longest: int) -> torch.Tensor:
    """int64 [layers, query_heads]: where in 1..`longest` each head's distance curve is highest."""
    curve = distance_curve(centre_products(statistics), rope, torch.arange(1, longest + 1))
    return 1 + curve.argmax(-1)


def wavelengths(rope: Rope) -> torch.Tensor:
    """float64 [head_dim / 2]: tokens per turn of each frequency pair; infinite where none."""
    return 2 * torch.pi / rope.padded_frequencies()
