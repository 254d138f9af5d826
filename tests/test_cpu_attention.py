"""Prefill attention of the CPU platform computes what SGLang's own does, and less of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_tri.patches.cpu import attention
from sglang_tri.patches.cpu.attention import PrefixAttention

HEADS, KV_HEADS, DIM = 4, 2, 8


def extend(backend: type, lengths: list[tuple[int, int]], **options: Any) -> torch.Tensor:
    """One prefill of requests with (cached, new) tokens in shuffled slots."""
    random = torch.Generator().manual_seed(len(lengths))
    total = sum(cached + new for cached, new in lengths)
    slots = torch.randperm(total, generator=random).int()
    table = torch.zeros(len(lengths), max(map(sum, lengths)), dtype=torch.int32)
    for row, part in enumerate(slots.split([sum(pair) for pair in lengths])):
        table[row, : len(part)] = part
    new = sum(new for _, new in lengths)
    query = torch.randn(new, HEADS, DIM, generator=random)
    keys, values = torch.randn(2, total, KV_HEADS, DIM, generator=random)
    result: torch.Tensor = backend._run_sdpa_forward_extend(
        backend.__new__(backend),
        query,
        torch.full_like(query, torch.nan),
        keys,
        values,
        table,
        torch.arange(len(lengths)),
        torch.tensor([sum(pair) for pair in lengths]),
        torch.tensor([cached for cached, _ in lengths]),
        torch.tensor([new for _, new in lengths]),
        **{"scaling": 0.3, "enable_gqa": True, "causal": True, **options},
    )
    return result


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=5))
def test_equals_sglang(lengths: list[tuple[int, int]]) -> None:
    expected = extend(TorchNativeAttnBackend, lengths)
    torch.testing.assert_close(extend(PrefixAttention, lengths), expected)


@pytest.mark.parametrize("options", [{"causal": False}, {"sliding_window_size": 3}])
def test_the_rest_is_left_to_sglang(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attention, "_attend")
    lengths = [(5, 3), (0, 4)]
    expected = extend(TorchNativeAttnBackend, lengths, **options)
    torch.testing.assert_close(extend(PrefixAttention, lengths, **options), expected)
