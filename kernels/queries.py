"""What keys are scored against: one virtual query and weights of moduli per query head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tri.kernels.pairs import frequency_pairs


@dataclass(frozen=True)
class Queries:
    """Virtual queries before RoPE, and weights of the keys' moduli, of every query head.

    Attributes:
        centre: float32 [layers, query_heads, 2, pairs], real and imaginary parts.
        magnitude: float32 [layers, query_heads, pairs], weights of the moduli.
        frequencies: float64 [pairs], radians per position; 0 where RoPE rotates nothing.
        rotary_dim: leading components of a head that RoPE rotates.
        interleaved: whether neighbours make a pair (GPT-J style), not halves (NeoX style).
        variance: like magnitude, weights of the moduli's squares; None where they are not known.

    Raises:
        ValueError: the shapes do not fit together.
    """

    centre: torch.Tensor
    magnitude: torch.Tensor
    frequencies: torch.Tensor
    rotary_dim: int
    interleaved: bool
    variance: torch.Tensor | None = None

    def __post_init__(self) -> None:
        layers, heads, parts, pairs = self.centre.shape
        fits = self.magnitude.shape == (layers, heads, pairs) and parts == 2
        if not fits or self.frequencies.shape != (pairs,):
            raise ValueError(
                f"centre {tuple(self.centre.shape)}, magnitude {tuple(self.magnitude.shape)} and "
                f"frequencies {tuple(self.frequencies.shape)} do not fit together"
            )
        if self.variance is not None and self.variance.shape != self.magnitude.shape:
            raise ValueError(
                f"variance {tuple(self.variance.shape)} and magnitude "
                f"{tuple(self.magnitude.shape)} do not fit together"
            )

    @property
    def layers(self) -> int:
        return self.centre.shape[0]

    @property
    def heads(self) -> int:
        return self.centre.shape[1]

    @property
    def pairs(self) -> int:
        return self.centre.shape[3]

    def components(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Component indices of the pairs, int64 [pairs] both, see `frequency_pairs`."""
        return frequency_pairs(
            2 * self.pairs, self.rotary_dim, self.interleaved, self.centre.device
        )

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """The queries rotated to `positions`, in the layout of the cached keys.

        Args:
            positions: int64 [requests], logical lengths.

        Returns:
            float32 [layers, requests, query_heads, head_dim].
        """
        # Float32 would lose the phase of a frequency near 1 at positions of tens of thousands.
        phase = torch.remainder(positions.double()[:, None] * self.frequencies, 2 * torch.pi)
        turn = torch.polar(torch.ones_like(phase), phase).to(torch.complex64)
        centre = torch.complex(self.centre[:, :, 0], self.centre[:, :, 1])
        rotated = centre[:, None] * turn[None, :, None]
        first, second = self.components()
        query = rotated.real.new_empty(*rotated.shape[:-1], 2 * self.pairs)
        query[..., first] = rotated.real
        query[..., second] = rotated.imag
        return query

    def slice_layers(self, first: int, last: int) -> Queries:
        """Layers [first, last)."""
        return Queries(
            self.centre[first:last],
            self.magnitude[first:last],
            self.frequencies,
            self.rotary_dim,
            self.interleaved,
            None if self.variance is None else self.variance[first:last],
        )

    def weights(self, squared: bool) -> torch.Tensor:
        """`variance` where the squares of moduli are weighed, else `magnitude`.

        Raises:
            ValueError: there is no `variance`.
        """
        if not squared:
            return self.magnitude
        if self.variance is None:
            raise ValueError("these queries have no variance: moduli cannot be weighed squared")
        return self.variance
