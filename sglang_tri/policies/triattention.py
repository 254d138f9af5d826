"""TriAttention: keep the keys that future queries are expected to attend to."""

from __future__ import annotations

import torch

from sglang_tri.kernels.score import score
from sglang_tri.policies.base import Candidates, ScoringPolicy


class TriAttention(ScoringPolicy):
    """Scores from statistics of queries before RoPE (arXiv 2604.04921), see `queries`."""

    name = "triattention"
    needs_statistics = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        queries = candidates.queries
        if queries is None:
            raise RuntimeError("triattention was started without query statistics")
        return score(
            candidates.keys,
            candidates.slots,
            queries.at(candidates.logical),
            queries.magnitude,
            queries.pairs,
        )
