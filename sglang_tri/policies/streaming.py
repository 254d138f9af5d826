"""StreamingLLM over the generation: the first tokens and the most recent ones."""

from __future__ import annotations

import torch

from sglang_tri.kernels.moves import Moves
from sglang_tri.policies.base import Candidates, DirectPolicy


class Streaming(DirectPolicy):
    """Attention sinks plus a window (arXiv 2309.17453), applied to generated tokens only."""

    name = "streaming"

    def moves(self, candidates: Candidates) -> Moves:
        """One set for all layers and heads: everything behind the sinks moves down."""
        sinks, budgets = candidates.settings.sinks, candidates.budgets
        counts = candidates.pages.counts()
        evicted = (counts - budgets.kept).clamp(min=0)
        target = torch.arange(sinks, max(sinks, budgets.largest), device=counts.device).int()
        source = target + evicted[:, None].int()
        moving = (budgets.kept - sinks).where(evicted > 0, 0).int()
        return Moves(
            target.expand_as(source)[None, :, None].contiguous(),
            source[None, :, None].contiguous(),
            moving[None, :, None].contiguous(),
        )
