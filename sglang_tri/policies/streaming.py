"""StreamingLLM over the generation: the first tokens and the most recent ones."""

from __future__ import annotations

import torch

from sglang_tri.policies.base import Candidates, Policy


class Streaming(Policy):
    """Attention sinks plus a window (arXiv 2309.17453), applied to generated tokens only."""

    name = "streaming"
    keeps_order = True

    def keep(self, candidates: Candidates) -> torch.Tensor:
        requests, total = candidates.slots.shape
        sinks = candidates.settings.sinks
        device = candidates.slots.device
        kept = torch.cat(
            [
                torch.arange(sinks, device=device),
                torch.arange(total - candidates.kept + sinks, total, device=device),
            ]
        )
        return kept.expand(1, requests, 1, -1)
