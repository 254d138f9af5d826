"""TriAttention: keep the keys that future queries are expected to attend to."""

from __future__ import annotations

from sglang_tri.kernels.score import score
from sglang_tri.kernels.scores import Scores
from sglang_tri.policies.base import Candidates, ScoringPolicy


class TriAttention(ScoringPolicy):
    """Scores from statistics of queries before RoPE (arXiv 2604.04921), see `queries`."""

    name = "triattention"
    needs_statistics = True

    def score(self, candidates: Candidates) -> Scores:
        if candidates.queries is None:
            raise RuntimeError("triattention was started without query statistics")
        return score(
            candidates.keys,
            candidates.pages,
            candidates.queries,
            candidates.logical,
            candidates.key_scale,
            candidates.workspace,
            self.needs_second_moments,
        )
