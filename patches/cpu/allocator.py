"""Paged KV slot allocation in plain torch, for machines where Triton kernels cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import KVCache


def make_allocator(
    size: int,
    *,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    kvcache: KVCache,
    need_sort: bool,
) -> BaseTokenToKVPoolAllocator:
    """The allocator SGLang would pick on a GPU, without its kernels.

    SGLang asks an out-of-tree platform for one class for every page size, so the choice that it
    makes itself elsewhere (single slots below page size 2) is made here.

    Args:
        size: slots in the pool, the padding slot 0 not counted.
        page_size: slots a page.
        dtype: type of the cached values; kept, not used.
        device: where the index tensors live.
        kvcache: pool that the slots index.
        need_sort: keep freed pages apart and sort them in when the free list runs short.
    """
    if page_size == 1:
        return TokenToKVPoolAllocator(size, dtype, device, kvcache, need_sort)
    return TorchPagedAllocator(size, page_size, dtype, device, kvcache, need_sort)


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator with its two kernels replaced by torch operations.

    Indices, the order in which free pages are used up and `None` for "out of memory" are the same
    as the parent's; pages come from the front of `free_pages`, request after request.
    """

    free_pages: torch.Tensor  # int64 [free pages], page numbers from 1

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots that take each request from `prefix_lens` to `seq_lens` tokens.

        Args:
            prefix_lens: int64 [batch], tokens that already have slots.
            prefix_lens_cpu: the same values; pages are counted on this copy, as the parent does.
            seq_lens: int64 [batch], tokens that must have slots afterwards.
            seq_lens_cpu: the same values, like `prefix_lens_cpu`.
            last_loc: int32 or int64 [batch], slot of each request's last token, or -1.
            extend_num_tokens: sum of `seq_lens - prefix_lens`.
            num_new_pages: pages needed in all, where the caller knows it.

        Returns:
            int64 [extend_num_tokens], the requests' new slots one after the other, or None when
            the free pages do not suffice; nothing is taken then.
        """
        ps = self.page_size
        if self.debug_mode and ((last_loc + 1) % ps != prefix_lens % ps).any():
            raise ValueError("last_loc does not match prefix_lens")
        # The parent merges on this estimate, an upper bound; the page order depends on it.
        if self.need_sort and extend_num_tokens // ps + len(prefix_lens) + 1 > len(self.free_pages):
            self.merge_and_sort_free()

        if num_new_pages is None:
            num_new_pages = int((_pages(seq_lens_cpu, ps) - _pages(prefix_lens_cpu, ps)).sum())
        taken = self._take_pages(num_new_pages)
        if taken is None:
            return None

        pages_before = _pages(prefix_lens, ps)
        new_pages = _pages(seq_lens, ps) - pages_before
        lens = seq_lens - prefix_lens
        starts = lens.cumsum(0) - lens
        # Position of every new token in its request, and the request it belongs to.
        owner = torch.repeat_interleave(lens, output_size=extend_num_tokens)
        position = torch.arange(extend_num_tokens, device=self.device)
        position += (prefix_lens - starts)[owner]
        # A token lies either in the request's old last page or in one of its new pages.
        page = position // ps - pages_before[owner]
        first_page = (new_pages.cumsum(0) - new_pages)[owner]
        out = (last_loc.to(torch.int64) - prefix_lens + 1)[owner] + position
        fresh = page >= 0
        out[fresh] = taken[(first_page + page)[fresh]] * ps + position[fresh] % ps
        return self._checked(out)

    def alloc_decode(
        self,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
    ) -> torch.Tensor | None:
        """One slot a request, for the token that makes it `seq_lens` long.

        Args:
            seq_lens: int64 [batch], lengths with the new token.
            seq_lens_cpu: the same values; pages are counted on this copy, as the parent does.
            last_loc: int32 or int64 [batch], slot of each request's last token so far.

        Returns:
            int64 [batch], or None when the free pages do not suffice; nothing is taken then.
        """
        ps = self.page_size
        if self.debug_mode and ((last_loc + 2) % ps != seq_lens % ps).any():
            raise ValueError("last_loc does not match seq_lens")
        if self.need_sort and len(seq_lens) > len(self.free_pages):
            self.merge_and_sort_free()

        opens_page = seq_lens % ps == 1
        taken = self._take_pages(int((seq_lens_cpu % ps == 1).sum()))
        if taken is None:
            return None
        out = last_loc.to(torch.int64) + 1
        out[opens_page] = taken * ps
        return self._checked(out)

    def _take_pages(self, count: int) -> torch.Tensor | None:
        """The first `count` free pages, removed from the list, or None if there are fewer."""
        if count > len(self.free_pages):
            return None
        taken = self.free_pages[:count]
        self.free_pages = self.free_pages[count:]
        return taken

    def _checked(self, out: torch.Tensor) -> torch.Tensor:
        if self.debug_mode and len(torch.unique(out)) != len(out):
            raise ValueError("a slot was handed out twice")
        return out


def _pages(lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Pages that hold so many tokens, the last one perhaps in part."""
    return (lens + page_size - 1) // page_size
