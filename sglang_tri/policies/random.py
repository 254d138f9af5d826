"""Random eviction: what any other policy must beat on the same traffic."""

from __future__ import annotations

import torch

from sglang_tri.kernels.moves import Moves, Selection
from sglang_tri.kernels.scores import Scores
from sglang_tri.kernels.select import select
from sglang_tri.policies.base import Candidates, DirectPolicy


class Random(DirectPolicy):
    """A random set for each KV head, the same in all layers, drawn anew in every round.

    The draw follows from logical length, head and place alone: a run can be repeated.
    """

    name = "random"

    def moves(self, candidates: Candidates) -> Moves:
        pages, heads = candidates.pages, candidates.keys.heads
        return select(
            Scores.of(draw(candidates.logical, heads, pages.longest)[None], pages.counts()),
            pages,
            candidates.budgets,
            Selection(heads, "per-head", normalize=False, keep_order=True),
            workspace=candidates.workspace,
        )


def draw(logical: torch.Tensor, heads: int, longest: int) -> torch.Tensor:
    """Hashes of (logical length, head, place) in 24 bits: float32 [requests, heads, longest]."""
    head = torch.arange(heads, device=logical.device)[:, None]
    place = torch.arange(longest, device=logical.device)
    mixed = _mix(_mix(_mix(logical)[:, None, None] + head) + place)
    return (mixed >> 8).float()


def _mix(words: torch.Tensor) -> torch.Tensor:
    """The finalizer of MurmurHash3 (Appleby, public domain) on 32-bit words held in int64."""
    words = words & 0xFFFFFFFF
    words = ((words ^ words >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    words = ((words ^ words >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return words ^ words >> 16
