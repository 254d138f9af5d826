"""The compact kernel for GPUs: rows are copied as words, whatever they hold."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_tri.kernels.device import candidates_of, kernel, locate
from sglang_tri.kernels.moves import Moves
from sglang_tri.kernels.pages import PagedBuffers, Pages

_WORD = 4
_BLOCK = 64


def launch(cache: PagedBuffers, pages: Pages, moves: Moves) -> None:
    """See `sglang_tri.kernels.compact.compact`."""
    layers, requests, heads = moves.count.shape
    if requests == 0:
        return
    compact_kernel[(cache.heads, requests, len(cache))](
        cache.pointers,
        moves.target,
        moves.source,
        moves.count,
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        pages.skipped,
        layers,
        moves.target.shape[-1],
        **variant(cache, heads > 1),
    )


def variant(cache: PagedBuffers, per_head: bool) -> dict[str, object]:
    """Constants that the kernel is compiled for; none depends on a round.

    Raises:
        ValueError: rows are not whole words.
    """
    size = cache.dtype.itemsize
    sizes = [cache.head_dim * size, *(stride * size for stride in cache.strides)]
    if any(length % _WORD for length in sizes):
        raise ValueError(f"rows and strides of {sizes} bytes are not multiples of {_WORD}")
    row, page, token, head = (length // _WORD for length in sizes)
    return {
        "PER_HEAD": per_head,
        "WORDS": row,
        "WORDS_PADDED": triton.next_power_of_2(row),
        "PAGE_SIZE": cache.page_size,
        "PAGE_STRIDE": page,
        "TOKEN_STRIDE": token,
        "HEAD_STRIDE": head,
        "BLOCK": _BLOCK,
        "num_warps": 4,
        "num_stages": 3,
    }


@kernel
def compact_kernel(
    pointers,
    target,
    source,
    moves,
    indptr,
    indices,
    last_page_len,
    skipped,
    set_layers,
    most,
    PER_HEAD: tl.constexpr,
    WORDS: tl.constexpr,
    WORDS_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All moves of one request in one layer and KV head, in their order."""
    head = tl.program_id(0)
    request = tl.program_id(1)
    layer = tl.program_id(2)
    kept_set = layer % set_layers * tl.num_programs(1) + request
    if PER_HEAD:
        kept_set = kept_set * tl.num_programs(0) + head
    number = tl.load(moves + kept_set)
    page, _, skip = candidates_of(indptr, last_page_len, skipped, request, PAGE_SIZE)
    rows = tl.load(pointers + layer).to(tl.pointer_type(tl.int32))
    rows = tl.multiple_of(rows, 16) + head * HEAD_STRIDE
    word = tl.arange(0, WORDS_PADDED)
    for start in range(0, number, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        some = entry < number
        place = kept_set.to(tl.int64) * most + entry
        old = skip + tl.load(source + place, mask=some, other=0)
        new = skip + tl.load(target + place, mask=some, other=0)
        mask = some[:, None] & (word < WORDS)[None, :]
        old = locate(indices, page, old, some, PAGE_SIZE, PAGE_STRIDE, TOKEN_STRIDE)
        new = locate(indices, page, new, some, PAGE_SIZE, PAGE_STRIDE, TOKEN_STRIDE)
        row = tl.load(rows + old[:, None] + word[None, :], mask=mask)
        # A row of this block may lie where another one of it goes.
        tl.debug_barrier()
        tl.store(rows + new[:, None] + word[None, :], row, mask=mask)
