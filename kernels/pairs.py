"""Which two components of a head make one RoPE frequency pair."""

from __future__ import annotations

import torch


def frequency_pairs(
    head_dim: int, rotary_dim: int, interleaved: bool, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Component indices `(first, second)` of every pair; pair f is `x[first[f]] + i x[second[f]]`.

    The `rotary_dim / 2` rotated pairs come first, in the order of the RoPE frequencies. What lies
    outside `rotary_dim` is paired in the same style: those pairs have frequency 0.

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
    pair = torch.arange(head_dim // 2, device=device)
    if interleaved:
        return 2 * pair, 2 * pair + 1
    rotated, still = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = pair + (pair >= rotated) * rotated
    return first, first + torch.where(pair < rotated, rotated, still)
