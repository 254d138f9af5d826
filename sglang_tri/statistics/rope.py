"""What a rotary embedding does to one head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Engines make their tables in float32.
_PRECISION = 1e-5


@dataclass(frozen=True)
class Rope:
    """What the engine's rotary module does to one head.

    Attributes:
        frequencies: float64 [rotary_dim / 2], radians per position.
        factor: what cos and sin are multiplied with (YaRN's attention factor, else 1).
        head_dim: components of a head; those past rotary_dim are not rotated.
        interleaved: True where neighbours make a pair, False where halves do.
    """

    frequencies: torch.Tensor
    factor: float
    head_dim: int
    interleaved: bool

    @property
    def rotary_dim(self) -> int:
        return 2 * self.frequencies.numel()

    @property
    def style(self) -> str:
        """The pairing's name in statistics files."""
        return "interleaved" if self.interleaved else "half"

    def padded_frequencies(self) -> torch.Tensor:
        """float64 [head_dim / 2]: 0 where a pair is not rotated."""
        unrotated = self.head_dim // 2 - self.frequencies.numel()
        return torch.cat([self.frequencies, self.frequencies.new_zeros(unrotated)])

    def padded_factors(self) -> torch.Tensor:
        """float64 [head_dim / 2]: the factor, and 1 where a pair is not rotated."""
        factors = torch.ones(self.head_dim // 2, dtype=torch.float64)
        factors[: self.frequencies.numel()] = self.factor
        return factors

    def difference(self, other: Rope) -> tuple[str, str] | None:
        """What this one has and what `other` has, in words, or None where both rotate alike."""
        if self.style != other.style:
            return f"pairs in {self.style!r} style", f"pairs in {other.style!r} style"
        if self.rotary_dim != other.rotary_dim:
            return f"rotary size {self.rotary_dim}", f"rotary size {other.rotary_dim}"
        if abs(self.factor - other.factor) > _PRECISION * other.factor:
            return f"factor {self.factor:.6g}", f"factor {other.factor:.6g}"
        apart = (self.frequencies - other.frequencies).abs() > _PRECISION * other.frequencies
        if not apart.any():
            return None
        pair = int(apart.nonzero()[0])
        mine, theirs = (float(rope.frequencies[pair]) for rope in (self, other))
        return f"frequency {mine:.6g} in pair {pair}", f"frequency {theirs:.6g} in pair {pair}"
