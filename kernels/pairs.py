"""Which two components of a head make one RoPE frequency pair."""

from __future__ import annotations

import torch


def frequency_pairs(
    head_dim: int, rotary_dim: int, interleaved: bool, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Component indices `(first, second)` of every pair; pair f is `x[first[f]] + i x[second[f]]`.

    The `rotary_dim / 2` rotated pairs come first, in the order of the RoPE frequencies. What lies
    outside `rotary_dim` is paired half-wise: those pairs have frequency 0.

    Args:
        head_dim: components of one head, even.
        rotary_dim: leading components that RoPE rotates, even, at most `head_dim`.
        interleaved: True pairs neighbours (GPT-J style), False pairs halves (NeoX style).

    Returns:
        Two int64 tensors of shape [head_dim / 2].

    Raises:
        ValueError: a dimension is odd or `rotary_dim` exceeds `head_dim`.
    """
    if head_dim % 2 or rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(
            f"head_dim {head_dim} and rotary_dim {rotary_dim} must be even, "
            "and rotary_dim at most head_dim"
        )
    half = rotary_dim // 2
    rotated = torch.arange(half, device=device)
    first, second = (2 * rotated, 2 * rotated + 1) if interleaved else (rotated, rotated + half)
    rest = torch.arange(rotary_dim, rotary_dim + (head_dim - rotary_dim) // 2, device=device)
    return (
        torch.cat([first, rest]),
        torch.cat([second, rest + (head_dim - rotary_dim) // 2]),
    )
