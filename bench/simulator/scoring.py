"""TriAttention key scores (arXiv 2604.04921), evaluated literally in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

OFFSETS = tuple(2**i for i in range(17))
"""Distances ahead, in tokens, at which a future query is expected: 1, 2, 4, ..., 65536."""


def key_scores(
    keys: torch.Tensor,
    distance: torch.Tensor,
    mean: torch.Tensor,
    abs_mean: torch.Tensor,
    omega: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Scores of one layer's candidates for its query heads: float64 [kv heads, group, n].

    S(k) = mean over o of sum_f s_f^2 Re(E[q_f] conj(k_f) e^{i omega_f (distance + o)})
           + sum_f s_f^2 (E|q_f| - |E[q_f]|) |k_f|

    keys: complex128 [kv heads, n, F], before RoPE; distance: t - p, [kv heads, n];
    mean: complex128 [kv heads, group, F]; abs_mean: float64, likewise; omega (radians per
    position) and scale (RoPE attention factor s): float64 [F].
    """
    squared = scale * scale
    total = torch.zeros(1, dtype=torch.float64)
    for logits in expected_logits(keys, distance, mean, omega, scale):
        total = total + logits
    spread = (abs_mean - mean.abs()) * squared
    return total / len(OFFSETS) + torch.einsum("hgf,hnf->hgn", spread, keys.abs())


def expected_logits(
    keys: torch.Tensor,
    distance: torch.Tensor,
    mean: torch.Tensor,
    omega: torch.Tensor,
    scale: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """The mean query's logits times sqrt(head_dim), for each offset o: float64 [heads, group, n].

    Arguments as for `key_scores`.
    """
    now = keys.conj() * _turn(distance, omega) * (scale * scale)
    for offset in OFFSETS:
        ahead = mean * _turn(torch.tensor(offset), omega)
        yield torch.einsum("hgf,hnf->hgn", ahead, now).real


def _turn(distance: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """e^{i omega_f distance}: complex128 [..., F]."""
    angle = distance.to(torch.float64)[..., None] * omega
    return torch.polar(torch.ones_like(angle), angle)


def znorm(rows: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (std + 1e-6) over the last axis, with the population's deviation."""
    mean = rows.mean(dim=-1, keepdim=True)
    deviation = rows.std(dim=-1, correction=0, keepdim=True)
    return (rows - mean) / (deviation + 1e-6)


def combine(scores: torch.Tensor, mode: str, normalize: bool = True) -> torch.Tensor:
    """From scores [layers, kv heads, group, n] to [layers or 1, kv heads or 1, n].

    First the z-norm of each query head's row, then the maximum over the group, then the mode.
    """
    rows = (znorm(scores) if normalize else scores).amax(dim=2)
    if mode == "per-layer-per-head":
        return rows
    if mode == "per-head":
        return rows.mean(dim=0, keepdim=True)
    if mode == "union":
        return rows.amax(dim=(0, 1), keepdim=True)
    raise ValueError(f"unknown mode {mode!r}")
