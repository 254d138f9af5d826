"""Fold statistics and future offsets into one virtual query per head.

The published score of a key (arXiv 2604.04921) is a mean over future offsets of the expected
attention logit, plus a term for what the mean query misses. The mean over offsets is linear, so
it folds into a constant per frequency, and the first part becomes the ordinary attention logit
between the cached key and one query.

The published second term is sum_f (E|q_f| - |E q_f|) |k_f|. With second moments there is another:
of a Gaussian query, the log of the expected exponentiated logit exceeds the expected logit by
sum_f E|q_f - E q_f|^2 |k_f|^2 / (4 head_dim), so that times sqrt(head_dim) it stands on one scale
with the first part.
"""

from __future__ import annotations

import math

import torch

from sglang_tri.kernels.queries import Queries
from sglang_tri.statistics import Statistics
from sglang_tri.statistics.rope import Rope

OFFSETS = tuple(2**exponent for exponent in range(17))


def virtual_queries(
    statistics: Statistics, rope: Rope, device: torch.device | str = "cpu"
) -> Queries:
    """Virtual queries of a model on `device`.

    A query's centre is s E[q_f] mean_o e^{i w_f o}, its magnitude weight s (E|q_f| - |E q_f|), with
    RoPE's attention factor s (1 but for YaRN and its kin); the cached key carries the other s.
    Its variance weight is s^2 E|q_f - E q_f|^2 / (4 sqrt(head_dim)).
    """
    frequencies = rope.padded_frequencies()
    factor = rope.padded_factors()
    offsets = torch.tensor(OFFSETS, dtype=torch.float64)
    fold = torch.polar(torch.ones(1, dtype=torch.float64), offsets[:, None] * frequencies)
    centre = statistics.q_mean.to(torch.complex128) * (factor * fold.mean(0))
    spread = (statistics.q_abs.double() - statistics.q_mean.abs().double()) * factor
    variance = _variance(statistics, factor)
    return Queries(
        torch.stack([centre.real, centre.imag], 2).float().to(device),
        spread.float().to(device),
        frequencies.to(device),
        rope.rotary_dim,
        rope.interleaved,
        None if variance is None else variance.float().to(device),
    )


def _variance(statistics: Statistics, factor: torch.Tensor) -> torch.Tensor | None:
    """Weights of squared moduli, float64 [layers, query_heads, pairs]; None without E|q_f|^2."""
    if statistics.q_square is None:
        return None
    spread = statistics.q_square.double() - statistics.q_mean.abs().double().square()
    return spread * factor.square() / (4 * math.sqrt(statistics.shape[2]))
