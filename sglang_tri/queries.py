"""Fold statistics and future offsets into one virtual query per head.

The published score of a key (arXiv 2604.04921) is a mean over future offsets of the expected
attention logit, plus a term for what the mean query misses. The mean over offsets is linear, so
it folds into a constant per frequency, and the first part becomes the ordinary attention logit
between the cached key and one query.
"""

from __future__ import annotations

import torch

from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.rope import Rope
from sglang_tri.stats import Statistics

OFFSETS = tuple(2**exponent for exponent in range(17))


class VirtualQueries:
    """Virtual queries and magnitude weights of a model, on the device of its KV cache.

    Attributes:
        magnitude: float32 [layers, query_heads, head_dim / 2], s (E|q_f| - |E q_f|).
        pairs: component indices of the frequency pairs.
    """

    def __init__(self, statistics: Statistics, rope: Rope, device: torch.device | str) -> None:
        self.pairs = frequency_pairs(rope.head_dim, rope.rotary_dim, rope.interleaved, device)
        frequencies = rope.padded_frequencies()
        factor = rope.padded_factors()
        offsets = torch.tensor(OFFSETS, dtype=torch.float64)
        fold = torch.polar(torch.ones(1, dtype=torch.float64), offsets[:, None] * frequencies)
        centre = statistics.q_mean.to(torch.complex128) * (factor * fold.mean(0))
        spread = (statistics.q_abs.double() - statistics.q_mean.abs().double()) * factor
        self.magnitude = spread.float().to(device)
        self._centre = centre.to(torch.complex64).to(device)
        self._frequencies = frequencies.to(device)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Queries rotated to each request's next position.

        Args:
            positions: int64 [requests], logical lengths.

        Returns:
            float32 [layers, requests, query_heads, head_dim], in the layout of the cached keys.
        """
        # Float32 would lose the phase of a frequency near 1 at positions of tens of thousands.
        phase = torch.remainder(positions.double()[:, None] * self._frequencies, 2 * torch.pi)
        turn = torch.polar(torch.ones_like(phase), phase).to(torch.complex64)
        rotated = self._centre[:, None] * turn[None, :, None]
        first, second = self.pairs
        query = rotated.real.new_empty(*rotated.shape[:-1], 2 * rotated.shape[-1])
        query[..., first] = rotated.real
        query[..., second] = rotated.imag
        return query
