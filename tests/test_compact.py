"""Compaction moves exactly the rows that it should: payloads tell layer, slot, head and part."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tri.kernels.compact import compact, packing

POOL = 97


def ramp(layers: int, heads: int, dim: int) -> list[torch.Tensor]:
    """A different value for every (layer, slot, head); components tell misplaced bytes apart."""
    total = layers * POOL * heads * dim
    return list(torch.arange(total).view(layers, POOL, heads, dim).clone())


@st.composite
def rounds(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, bool, int, int]:
    requests = draw(st.integers(1, 3))
    heads, layers = draw(st.sampled_from([(1, 1), (2, 1), (2, 3)]))
    per_head, per_layer = draw(st.booleans()), draw(st.booleans())
    budget = draw(st.integers(1, 12))
    interval = draw(st.integers(1, 12))
    recent = draw(st.integers(0, min(budget, interval)))
    count = budget + interval
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(POOL, generator=generator)[: requests * count].view(requests, count)
    shape = (layers if per_layer else 1, requests, heads if per_head else 1)
    order = torch.rand(*shape, count - recent, generator=generator).argsort(-1)
    tail = torch.arange(count - recent, count).expand(*shape, recent)
    kept = torch.cat([order[..., : budget - recent].sort(-1).values, tail], -1)
    return slots, kept, recent, draw(st.booleans()), layers, heads


@settings(max_examples=150, deadline=None)
@given(rounds())
def test_compaction(case: tuple[torch.Tensor, torch.Tensor, int, bool, int, int]) -> None:
    slots, kept, recent, keep_order, layers, heads = case
    requests, count = slots.shape
    budget = kept.shape[-1]
    before = ramp(layers, heads, 4)
    after = [cache.clone() for cache in before]
    packed = packing(kept, count, recent, keep_order)
    compact(after, slots, packed)
    for layer in range(layers):
        for request in range(requests):
            for head in range(heads):
                row = kept[min(layer, len(kept) - 1), request, min(head, kept.shape[2] - 1)]
                source = before[layer][slots[request, row], head]
                result = after[layer][slots[request, :budget], head]
                if keep_order:
                    assert torch.equal(result, source)
                else:
                    assert torch.equal(result.sort(0).values, source.sort(0).values)
                    tail = slice(budget - recent, budget)
                    assert torch.equal(result[tail], source[tail])
                    assert moved(result, before[layer][slots[request, :budget], head]) <= (
                        count - budget + recent
                    )
    touched = slots[:, :budget].flatten()
    others = [i for i in range(POOL) if i not in set(touched.tolist())]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(after, before, strict=True))


def moved(result: torch.Tensor, original: torch.Tensor) -> int:
    return int((result != original).any(-1).sum())
