"""What a rotary embedding does to one head."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def agrees_with(self, other: Rope) -> bool:
        """Whether both rotate alike, to the precision that engines make their tables with."""
        return (
            (self.head_dim, self.interleaved) == (other.head_dim, other.interleaved)
            and self.frequencies.shape == other.frequencies.shape
            and torch.allclose(self.frequencies, other.frequencies, rtol=1e-5, atol=0)
            and abs(self.factor - other.factor) <= 1e-5 * other.factor
        )

    def __str__(self) -> str:
        slowest = float(self.frequencies.min())
        return (
            f"{self.style} pairs, rotary size {self.rotary_dim} of {self.head_dim}, "
            f"slowest frequency {slowest:.4g}, factor {self.factor:.4g}"
        )
