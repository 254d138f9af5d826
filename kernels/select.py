"""Choose the kept candidates from scores."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def normalize(scores: torch.Tensor) -> torch.Tensor:
    """Z-norm of each row over its candidates (last axis), population deviation."""
    centred = scores - scores.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / (deviation + EPSILON)


def aggregate(scores: torch.Tensor, kv_heads: int, mode: str) -> torch.Tensor:
    """One row of scores per kept set: max over the group of a KV head, then by mode.

    Args:
        scores: float32 [layers, requests, query_heads, candidates].
        kv_heads: KV heads; `query_heads` is a multiple of it.
        mode: `per-head` (mean over layers), `per-layer-per-head` or `union` (max over all).

    Returns:
        float32 [layers or 1, requests, kv_heads or 1, candidates].

    Raises:
        ValueError: an unknown mode.
    """
    layers, requests, query_heads, candidates = scores.shape
    grouped = scores.view(layers, requests, kv_heads, query_heads // kv_heads, candidates)
    per_head = grouped.amax(3)
    if mode == "per-layer-per-head":
        return per_head
    if mode == "per-head":
        return per_head.mean(0, keepdim=True)
    if mode == "union":
        return per_head.amax((0, 2), keepdim=True)
    raise ValueError(f"unknown selection mode {mode!r}")


def select(scores: torch.Tensor, budget: int, recent: int) -> torch.Tensor:
    """Indices of the kept candidates: the last `recent`, and the best of the others.

    The lowest index wins a tie; NaN counts as the lowest score.

    Args:
        scores: float32 [..., candidates], from `aggregate`.
        budget: candidates kept, at most `candidates`.
        recent: last candidates that are always kept, at most `budget`.

    Returns:
        int64 [..., budget], ascending.

    Raises:
        ValueError: the counts do not fit.
    """
    candidates = scores.shape[-1]
    if not 0 <= recent <= budget <= candidates:
        raise ValueError(f"cannot keep {budget} ({recent} recent) of {candidates} candidates")
    contested = torch.nan_to_num(scores[..., : candidates - recent], nan=-torch.inf)
    # torch.topk does not say which of equal scores it takes; a stable sort does.
    best = contested.sort(dim=-1, descending=True, stable=True).indices[..., : budget - recent]
    tail = torch.arange(candidates - recent, candidates, device=scores.device)
    return torch.cat([best.sort(-1).values, tail.expand(*best.shape[:-1], recent)], -1)
