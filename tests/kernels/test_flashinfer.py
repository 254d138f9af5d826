"""The contract with FlashInfer: its names for pages, and attention over what compaction leaves."""

from __future__ import annotations

import inspect

import flashinfer
import pytest
import torch

from sglang_tri.kernels.compact import compact
from sglang_tri.kernels.moves import Moves
from tests.interpreted import ON_GPU
from tests.kernels.layouts import Paged

KEPT, RECENT = 40, 4
LAYOUT = Paged(16, [0, 0], [57, 70], "NHD", 4)
QUERY_HEADS, KV_HEADS, DIM = 8, 2, 64


def kept_slots() -> torch.Tensor:
    """int64 [requests, kv_heads, KEPT]: random candidates, ascending, and the most recent."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in LAYOUT.counts:
        order = torch.rand(KV_HEADS, count - RECENT, generator=generator).argsort(-1)
        tail = torch.arange(count - RECENT, count).expand(KV_HEADS, -1)
        rows.append(torch.cat([order[:, : KEPT - RECENT].sort(-1).values, tail], -1))
    return torch.stack(rows)


def compacted(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V of one layer before compaction, and both after it: [2, pages, 16, heads, dim]."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(2, *LAYOUT.buffer(KV_HEADS, DIM), generator=generator)
    after = before.half().clone().to(device)
    kept = kept_slots()
    parts = [
        Moves.keeping(kept[request], count, RECENT, keep_order=False)
        for request, count in enumerate(LAYOUT.counts)
    ]
    moves = Moves(
        *(
            torch.stack([getattr(part, name) for part in parts])[None].to(device)
            for name in ("target", "source", "count")
        )
    )
    compact([LAYOUT.buffers(list(after))], LAYOUT.pages(device), moves)
    return before.half(), after, kept


def dense(before: torch.Tensor, kept: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Attention of one query per request over the kept tokens, float64 [requests, heads, dim]."""
    found = []
    for request in range(len(LAYOUT.counts)):
        places = LAYOUT.places(request)
        for head in range(QUERY_HEADS):
            group = head // (QUERY_HEADS // KV_HEADS)
            rows = [places[index] for index in kept[request, group].tolist()]
            keys, values = (
                torch.stack([part[(*place, group)] for place in rows]).double() for part in before
            )
            weights = (keys @ queries[request, head].double() / DIM**0.5).softmax(-1)
            found.append(weights @ values)
    return torch.stack(found).view(len(LAYOUT.counts), QUERY_HEADS, DIM)


def test_pages_have_the_names_and_types_of_flashinfer() -> None:
    planned = inspect.signature(flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan).parameters
    pages = LAYOUT.pages()
    for name in ("indptr", "indices", "last_page_len"):
        assert name in planned
        assert getattr(pages, name).dtype == torch.int32
    assert len(pages.indptr) == pages.requests + 1
    assert pages.indptr[-1] == len(pages.indices)
    pages_of = pages.indptr.diff()
    tokens = (pages_of - 1) * LAYOUT.page_size + pages.last_page_len
    assert tokens.tolist() == LAYOUT.counts


def test_attention_over_what_is_left(device: torch.device) -> None:
    """Slot order does not matter to attention; through the pages, in plain torch."""
    before, after, kept = compacted(device)
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(len(LAYOUT.counts), QUERY_HEADS, DIM, generator=generator).half()
    identity = torch.arange(KEPT).expand(*kept.shape)
    torch.testing.assert_close(
        dense(after.cpu(), identity, queries), dense(before, kept, queries), rtol=0, atol=1e-12
    )


@pytest.mark.skipif(not ON_GPU, reason="FlashInfer's kernels need an NVIDIA GPU")
def test_attention_through_flashinfer(on_triton: torch.device) -> None:
    before, after, kept = compacted(on_triton)
    pages = LAYOUT.pages(on_triton)
    used = -(-KEPT // LAYOUT.page_size)
    rows = [pages.indices[first : first + used] for first in pages.indptr[:-1].tolist()]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=on_triton), "NHD"
    )
    requests = len(LAYOUT.counts)
    wrapper.plan(
        indptr=torch.arange(requests + 1, dtype=torch.int32) * used,
        indices=torch.cat(rows),
        last_page_len=torch.full((requests,), (KEPT - 1) % LAYOUT.page_size + 1).int(),
        num_qo_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=LAYOUT.page_size,
        q_data_type=torch.float16,
        kv_data_type=torch.float16,
    )
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(requests, QUERY_HEADS, DIM, generator=generator).half()
    found = wrapper.run(queries.to(on_triton), (after[0], after[1]))
    torch.testing.assert_close(
        found.cpu().double(), dense(before, kept, queries), rtol=0, atol=5e-3
    )
