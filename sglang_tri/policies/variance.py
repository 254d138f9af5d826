"""TriAttention with the queries' variance in place of the published norm term."""

from __future__ import annotations

from sglang_tri.policies.triattention import TriAttention


class TriAttentionVariance(TriAttention):
    """Expected logits, and what a Gaussian query's variance adds to them, see `queries`.

    Needs E|q_f|^2, which official statistics files lack.
    """

    name = "triattention-variance"
    needs_second_moments = True
