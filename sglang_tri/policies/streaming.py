"""StreamingLLM over the generation: the first tokens and the most recent ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.moves import Moves
from sglang_tri.policies.base import Candidates, DirectPolicy

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig


class Streaming(DirectPolicy):
    """Attention sinks plus a window (arXiv 2309.17453), applied to generated tokens only."""

    name = "streaming"

    @classmethod
    def check_settings(cls, settings: KvPolicyConfig) -> None:
        if settings.sinks + settings.recent > settings.budget:
            raise KvPolicyError(
                f"--kv-sinks {settings.sinks} and --kv-recent {settings.recent} are more than "
                f"--kv-budget {settings.budget} together: make one of them smaller."
            )

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
