"""Move the kept rows of K and V into the first slots of each request's candidates, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_tri.kernels import compact_triton
from sglang_tri.kernels.backend import has_triton
from sglang_tri.kernels.moves import Moves
from sglang_tri.kernels.pages import PagedBuffers, Pages


def compact(caches: Sequence[PagedBuffers], pages: Pages, moves: Moves) -> None:
    """Copy rows within each cache, as `moves` says.

    Rows that are in no move are not touched. One launch for each of `caches` on a GPU; plain torch
    on a CPU.

    Args:
        caches: K and V; those of equal geometry in one, see `joined`. Changed in place.
        pages: the candidates.
        moves: of all layers, from `select`.

    Raises:
        ValueError: the moves do not fit the caches.
    """
    layers, requests, heads = moves.count.shape
    for cache in caches:
        if len(cache) % layers or heads not in (1, cache.heads) or requests != pages.requests:
            raise ValueError(
                f"moves [layers, requests, heads] {(layers, requests, heads)} do not fit "
                f"{len(cache)} layers, {pages.requests} requests and {cache.heads} heads"
            )
        if has_triton(cache.device):
            compact_triton.launch(cache, pages, moves)
        else:
            _reference(cache, pages, moves)


def joined(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], page_size: int = 1
) -> list[PagedBuffers]:
    """K and V for `compact`: as one where their geometry is the same, to be moved by one launch."""
    if keys[0].shape == values[0].shape and keys[0].stride() == values[0].stride():
        return [PagedBuffers([*keys, *values], page_size)]
    return [PagedBuffers(keys, page_size), PagedBuffers(values, page_size)]


def _reference(cache: PagedBuffers, pages: Pages, moves: Moves) -> None:
    entry = torch.arange(moves.target.shape[-1], device=cache.device)
    for request in range(pages.requests):
        page, row = pages.rows(request)
        for index, layer in enumerate(cache.layers):
            kept_set = index % len(moves.count), request
            some = (entry < moves.count[kept_set][:, None]).expand(cache.heads, -1)
            head = torch.arange(cache.heads, device=cache.device)[:, None].expand_as(some)[some]
            target = moves.target[kept_set].expand_as(some)[some]
            source = moves.source[kept_set].expand_as(some)[some]
            # The gather on the right is complete before the first row is written.
            layer[page[target], row[target], head] = layer[page[source], row[source], head]
