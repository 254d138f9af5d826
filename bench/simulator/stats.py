"""Query statistics in the layout that the TriAttention authors publish (arXiv 2604.04921)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Stats:
    """Means over the queries of a calibration set, taken before RoPE.

    A query's frequency pair f is the complex number q[f] + i q[f + r/2] (r: rotary dimension).
    """

    mean: torch.Tensor
    """E[q_f]: complex128 [layers, query heads, head_dim / 2]."""
    abs_mean: torch.Tensor
    """E|q_f|: float64 [layers, query heads, head_dim / 2]."""
    square: torch.Tensor | None = None
    """E|q_f|^2, likewise; official files lack it."""


def load_stats(path: str | Path, layers: int, heads: int, pairs: int) -> Stats:
    """Read a `.pt` file: {"metadata": {...}, "stats": {"layer00_head00": {three vectors}}}."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    table = content.get("stats")
    if not table:
        raise ValueError(f"{path}: no 'stats'")
    entries = [
        [_entry(table, f"layer{layer:02d}_head{head:02d}", pairs) for head in range(heads)]
        for layer in range(layers)
    ]
    means = torch.stack([torch.stack([mean for mean, _ in row]) for row in entries])
    sizes = torch.stack([torch.stack([size for _, size in row]) for row in entries])
    return Stats(mean=means, abs_mean=sizes)


def _entry(
    table: dict[str, dict[str, torch.Tensor]], name: str, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head's (complex mean, mean modulus), checked."""
    if name not in table:
        raise ValueError(f"statistics lack {name}")
    vectors = []
    for field in ("q_mean_real", "q_mean_imag", "q_abs_mean"):
        if field not in table[name]:
            raise ValueError(f"statistics lack {field} of {name}")
        vector = table[name][field].to(torch.float64)
        if vector.shape != (pairs,):
            raise ValueError(f"{name}.{field}: shape {tuple(vector.shape)}, expected ({pairs},)")
        vectors.append(vector)
    return torch.complex(vectors[0], vectors[1]), vectors[2]
