"""Shapes that the kernels are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from sglang_tri.kernels import compact_triton, score_triton, select_triton
from sglang_tri.kernels.backend import Traits
from sglang_tri.kernels.moves import MODES, Selection
from sglang_tri.kernels.pages import PagedBuffers
from sglang_tri.kernels.queries import Queries


class Geometry(NamedTuple):
    """One model's attention, how its KV cache is stored, and how a policy scores and selects.

    RoPE rotates the first `rotary_dim` components, or all. With `squared`, squares of moduli are
    weighed.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int | None = None
    interleaved: bool = False
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 1
    mode: str = "per-head"
    keep_order: bool = False
    squared: bool = False

    def variants(self, device: Traits) -> dict[str, dict[str, Any]]:
        """Constants of each kernel, by its name."""
        shape = 2, self.page_size, self.kv_heads, self.head_dim
        cache = PagedBuffers([torch.empty(shape, dtype=self.dtype, device="meta")], self.page_size)
        pairs = self.head_dim // 2
        queries = Queries(
            torch.empty(1, self.query_heads, 2, pairs, device="meta"),
            torch.empty(1, self.query_heads, pairs, device="meta"),
            torch.empty(pairs, dtype=torch.float64, device="meta"),
            self.rotary_dim or self.head_dim,
            self.interleaved,
        )
        selection = Selection(self.kv_heads, self.mode, keep_order=self.keep_order)
        score, double = (
            score_triton.variant(cache, queries, False, device, self.squared, buffers)
            for buffers in (1, 2)
        )
        return {
            "score": score,
            "score, 2 buffers": double,
            "select": select_triton.variant(self.query_heads, selection, self.page_size),
            "compact": compact_triton.variant(cache, selection.heads > 1),
        }


SHIPPED = (
    Geometry("Qwen3-8B", 32, 8, 128),
    Geometry("Qwen3-8B, per layer", 32, 8, 128, mode="per-layer-per-head"),
    Geometry("Qwen3-8B, union, pages of 64", 32, 8, 128, page_size=64, mode="union"),
    Geometry("Qwen3-8B, variance", 32, 8, 128, squared=True),
    Geometry("Llama-3-70B", 64, 8, 128, keep_order=True),
    Geometry("Qwen2.5-7B", 28, 4, 128),
    Geometry("Qwen2.5-0.5B", 14, 2, 64),
    Geometry("Phi-3-mini", 32, 32, 96),
    Geometry("Phi-2", 32, 32, 80, rotary_dim=32),
    Geometry("GLM-4-9B", 32, 2, 128, rotary_dim=64, interleaved=True),
    Geometry("Gemma-7B", 16, 16, 256),
    Geometry("192 components", 64, 8, 192, page_size=16),
    Geometry("Qwen3-8B, fp16", 32, 8, 128, dtype=torch.float16),
    Geometry("Qwen3-8B, fp32", 32, 8, 128, dtype=torch.float32),
    Geometry("Qwen3-8B, fp8 e4m3", 32, 8, 128, dtype=torch.float8_e4m3fn),
    Geometry("Qwen3-8B, fp8 e5m2", 32, 8, 128, dtype=torch.float8_e5m2),
)

_DTYPES = tuple(dict.fromkeys(shape.dtype for shape in SHIPPED))


def everything() -> Iterator[Geometry]:
    """All group sizes, head sizes, dtypes, pairings and shares of rotated components."""
    sizes = product(range(1, 17), (64, 80, 96, 128, 192, 256), _DTYPES, (False, True), (1, 2))
    for number, (group, head_dim, dtype, interleaved, share) in enumerate(sizes):
        yield Geometry(
            f"{group} x {head_dim}, {str(dtype).removeprefix('torch.')}, "
            f"{'interleaved' if interleaved else 'half'}, 1/{share} rotated",
            8 * group,
            8,
            head_dim,
            head_dim // share,
            interleaved,
            dtype,
            (1, 4, 16, 64)[number % 4],
            MODES[number % 3],
            number % 2 == 0,
        )
