"""Sums over what attention sees: RoPE undone, in slices, equal to means taken at once."""

from __future__ import annotations

import pytest
import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.statistics import moments
from sglang_tri.statistics.moments import Moments
from sglang_tri.statistics.rope import Rope

LAYERS, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 2, 4, 2, 16, 512
ROPES = {
    "plain": Rope(100.0 ** -torch.arange(0, 1, 1 / 8, dtype=torch.float64), 1.0, 16, False),
    "interleaved": Rope(100.0 ** -torch.arange(0, 1, 1 / 8, dtype=torch.float64), 1.0, 16, True),
    "factor": Rope(100.0 ** -torch.arange(0, 1, 1 / 8, dtype=torch.float64), 1.3, 16, False),
    "partial": Rope(100.0 ** -torch.arange(0, 1, 1 / 4, dtype=torch.float64), 1.2, 16, False),
}


def table(rope: Rope, dtype: torch.dtype) -> torch.Tensor:
    phase = torch.arange(POSITIONS)[:, None] * rope.frequencies
    return (rope.factor * torch.cat([phase.cos(), phase.sin()], -1)).to(dtype)


def sums(layers: int, rope: Rope, cos_sin: torch.Tensor) -> Moments:
    return Moments(layers, HEADS, KV_HEADS, rope, lambda: cos_sin)


def turned(heads: torch.Tensor, rope: Rope, cos_sin: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] as an engine rotates them with its own table."""
    cos, sin = cos_sin.float()[:, None].chunk(2, -1)
    first, second = (
        p[: cos.shape[-1]] for p in frequency_pairs(16, rope.rotary_dim, rope.interleaved)
    )
    result = heads.clone()
    result[..., first] = heads[..., first] * cos - heads[..., second] * sin
    result[..., second] = heads[..., second] * cos + heads[..., first] * sin
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROPES)
def test_means(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's table may be rounded: what it rounded is what is undone."""
    monkeypatch.setattr(moments, "_SLICE_BYTES", 8 * HEADS * HEAD_DIM // 2 * 7)
    rope, generator = ROPES[name], torch.Generator().manual_seed(0)
    cos_sin = table(rope, dtype)
    found = sums(LAYERS, rope, cos_sin)
    queries = 1 + torch.randn(LAYERS, POSITIONS, HEADS, HEAD_DIM, generator=generator)
    keys = 2 + torch.randn(LAYERS, POSITIONS, KV_HEADS, HEAD_DIM, generator=generator)
    order = torch.randperm(POSITIONS, generator=generator)
    for layer in range(LAYERS):
        q, k = (turned(x[layer], rope, cos_sin)[order].flatten(1) for x in (queries, keys))
        for part in torch.arange(POSITIONS).split(200):
            found.add(layer, q[part], k[part], order[part])
    result = found.statistics(POSITIONS, {})

    first, second = frequency_pairs(HEAD_DIM, rope.rotary_dim, rope.interleaved)
    pairs, key_pairs = (
        torch.complex(x[..., first].double(), x[..., second].double()) for x in (queries, keys)
    )
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(result.q_mean, pairs.mean(1), **close)
    torch.testing.assert_close(result.k_mean, key_pairs.mean(1), **close)
    torch.testing.assert_close(result.q_abs, pairs.abs().mean(1), **close)
    torch.testing.assert_close(result.q_square, pairs.abs().square().mean(1), **close)
    torch.testing.assert_close(result.q_norm, queries.double().norm(dim=-1).mean(1), **close)


def test_memory_does_not_grow_with_the_text() -> None:
    rope = ROPES["plain"]
    found = sums(1, rope, table(rope, torch.float32))
    rows = moments._SLICE_BYTES // (8 * HEADS * HEAD_DIM // 2)
    sizes: list[int] = []
    original = Moments._unrotated

    def watched(self: Moments, heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        result = original(self, heads, turn)
        sizes.append(result.numel() * result.element_size())
        return result

    Moments._unrotated = watched  # type: ignore[method-assign]
    try:
        tokens = 2 * rows + 5
        q, k = torch.ones(tokens, HEADS * HEAD_DIM), torch.ones(tokens, KV_HEADS * HEAD_DIM)
        found.add(0, q, k, torch.zeros(tokens, dtype=torch.int64))
    finally:
        Moments._unrotated = original  # type: ignore[method-assign]
    assert len(sizes) == 6
    assert max(sizes) <= moments._SLICE_BYTES


def test_a_table_that_the_engine_replaces() -> None:
    """SGLang converts it at its first use with some head sizes."""
    rope = ROPES["plain"]
    tables = [table(rope, torch.float32) * 9]
    found = Moments(1, HEADS, KV_HEADS, rope, lambda: tables[-1])
    tables.append(table(rope, torch.bfloat16))
    heads = torch.ones(POSITIONS, HEADS, HEAD_DIM)
    q = turned(heads, rope, tables[-1])
    found.add(0, q.flatten(1), q[:, :KV_HEADS].flatten(1), torch.arange(POSITIONS))
    mean = found.statistics(POSITIONS, {}).q_mean
    torch.testing.assert_close(mean, torch.full_like(mean, 1 + 1j))


def test_queries_of_few_bits() -> None:
    rope, cos_sin = ROPES["plain"], table(ROPES["plain"], torch.float32)
    generator = torch.Generator().manual_seed(0)
    queries = 3 + torch.randn(POSITIONS, HEADS, HEAD_DIM, generator=generator)
    found = sums(1, rope, cos_sin)
    rounded = turned(queries, rope, cos_sin).bfloat16()
    found.add(0, rounded.flatten(1), rounded[:, :KV_HEADS].flatten(1), torch.arange(POSITIONS))
    first, second = queries.chunk(2, -1)
    expected = torch.complex(first, second).mean(0)
    torch.testing.assert_close(
        found.statistics(POSITIONS, {}).q_mean[0], expected, rtol=0, atol=1e-2
    )


def test_a_layer_that_was_not_seen() -> None:
    rope = ROPES["plain"]
    found = sums(LAYERS, rope, table(rope, torch.float32))
    found.add(0, torch.ones(3, 64), torch.ones(3, 32), torch.arange(3))
    with pytest.raises(KvPolicyError, match="0 of 3 queries in layer 1"):
        found.statistics(3, {})
