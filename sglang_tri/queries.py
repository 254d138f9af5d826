"""Fold statistics and future offsets into one virtual query per head.

The published score of a key (arXiv 2604.04921) is a mean over future offsets of the expected
attention logit, plus a term for what the mean query misses. The mean over offsets is linear, so
it folds into a constant per frequency, and the first part becomes the ordinary attention logit
between the cached key and one query.
"""

from __future__ import annotations

import torch

from sglang_tri.kernels.queries import Queries
from sglang_tri.rope import Rope
from sglang_tri.stats import Statistics

OFFSETS = tuple(2**exponent for exponent in range(17))


def virtual_queries(
    statistics: Statistics, rope: Rope, device: torch.device | str = "cpu"
) -> Queries:
    """Virtual queries of a model on `device`.

    A query's centre is s E[q_f] mean_o e^{i w_f o}, its magnitude weight s (E|q_f| - |E q_f|), with
    RoPE's attention factor s (1 but for YaRN and its kin); the cached key carries the other s.
    """
    frequencies = rope.padded_frequencies()
    factor = rope.padded_factors()
    offsets = torch.tensor(OFFSETS, dtype=torch.float64)
    fold = torch.polar(torch.ones(1, dtype=torch.float64), offsets[:, None] * frequencies)
    centre = statistics.q_mean.to(torch.complex128) * (factor * fold.mean(0))
    spread = (statistics.q_abs.double() - statistics.q_mean.abs().double()) * factor
    return Queries(
        torch.stack([centre.real, centre.imag], 2).float().to(device),
        spread.float().to(device),
        frequencies.to(device),
        rope.rotary_dim,
        rope.interleaved,
    )
