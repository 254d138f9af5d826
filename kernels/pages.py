"""Where the rows of a paged KV cache lie: FlashInfer's convention, and SGLang's slot buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

Layout = Literal["NHD", "HND"]


class PagedBuffers:
    """K, or V, or both of all layers, as one set of paged buffers of equal geometry.

    Args:
        layers: per layer [pages, page_size, heads, head_dim] (NHD) or [pages, heads, page_size,
            head_dim] (HND), or SGLang's slot buffer [slots, heads, head_dim], in which slot s is
            row s % page_size of page s // page_size. Any dtype, components contiguous.
        page_size: tokens per page; what 4-dimensional buffers must have.
        layout: which of the two.

    Attributes:
        layers: the same memory as views [pages, page_size, heads, head_dim].

    Raises:
        ValueError: the buffers differ, or their shape does not fit.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], page_size: int = 1, layout: Layout = "NHD"
    ) -> None:
        if not layers:
            raise ValueError("no layers")
        self.layers = [_by_token(layer, page_size, layout) for layer in layers]
        self.page_size = page_size
        first = self.layers[0]
        for layer in self.layers:
            if _geometry(layer) != _geometry(first):
                raise ValueError(f"layers differ: {_geometry(layer)} and {_geometry(first)}")
        if first.stride(3) != 1:
            raise ValueError(f"components of a head are not contiguous: stride {first.stride(3)}")

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def heads(self) -> int:
        return self.layers[0].shape[2]

    @property
    def head_dim(self) -> int:
        return self.layers[0].shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements from page to page, token to token, head to head."""
        page, token, head, _ = self.layers[0].stride()
        return page, token, head

    @cached_property
    def pointers(self) -> torch.Tensor:
        """int64 [layers] on the buffers' device: the address of each layer."""
        addresses = [layer.data_ptr() for layer in self.layers]
        return torch.tensor(addresses, dtype=torch.int64).to(self.device)

    def slice_layers(self, first: int, last: int) -> PagedBuffers:
        """Layers [first, last)."""
        if (first, last) == (0, len(self)):
            return self
        part = object.__new__(PagedBuffers)
        part.layers, part.page_size = self.layers[first:last], self.page_size
        part.__dict__["pointers"] = self.pointers[first:last]
        return part


@dataclass(frozen=True)
class Pages:
    """The candidates of each request: its pages, less a number of leading tokens.

    `indptr`, `indices` and `last_page_len` are what FlashInfer's paged wrappers take under these
    names. Candidate i of a request is token `skipped + i` of its pages.

    Attributes:
        indptr: int32 [requests + 1]; request r has pages `indices[indptr[r]:indptr[r + 1]]`.
        indices: int32 [pages].
        last_page_len: int32 [requests], tokens in the last page.
        skipped: int32 [requests], leading tokens that are no candidates: the prompt.
        page_size: tokens per page.
        longest: at least the largest number of candidates of any request.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    skipped: torch.Tensor
    page_size: int
    longest: int

    @property
    def requests(self) -> int:
        return self.last_page_len.shape[0]

    def counts(self) -> torch.Tensor:
        """int64 [requests]: how many candidates each request has."""
        pages = self.indptr.diff().long()
        tokens = (pages - 1) * self.page_size + self.last_page_len - self.skipped
        return tokens.where(pages > 0, 0).clamp(min=0)

    def rows(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(page, row in the page) of each candidate of one request, int64 [candidates] both."""
        first, last = self.indptr[request : request + 2].tolist()
        skipped = int(self.skipped[request])
        count = int(self.counts()[request])
        token = torch.arange(skipped, skipped + count, device=self.indices.device)
        return self.indices[first:last].long()[token // self.page_size], token % self.page_size

    def gather(self, layer: torch.Tensor) -> torch.Tensor:
        """The candidates' rows in one layer of buffers, without waiting for the device.

        Args:
            layer: [pages, page_size, heads, head_dim], one of `PagedBuffers.layers`.

        Returns:
            [requests, longest, heads, head_dim]; what lies behind a request's candidates is not
            defined.
        """
        token = self.skipped[:, None] + torch.arange(self.longest, device=layer.device)
        page = (self.indptr[:-1, None] + token // self.page_size).clamp(max=len(self.indices) - 1)
        return layer[self.indices[page].long(), token % self.page_size]

    def slice_requests(self, first: int, last: int) -> Pages:
        """Requests [first, last)."""
        return Pages(
            self.indptr[first : last + 1],
            self.indices,
            self.last_page_len[first:last],
            self.skipped[first:last],
            self.page_size,
            self.longest,
        )


def _by_token(layer: torch.Tensor, page_size: int, layout: Layout) -> torch.Tensor:
    if layer.dim() == 3 and layout == "NHD" and layer.shape[0] % page_size == 0:
        return layer.unflatten(0, (-1, page_size))
    view = layer.transpose(1, 2) if layout == "HND" and layer.dim() == 4 else layer
    if view.dim() != 4 or view.shape[1] != page_size:
        raise ValueError(
            f"a buffer of shape {tuple(layer.shape)} has no {layout} pages of {page_size} tokens"
        )
    return view


def _geometry(layer: torch.Tensor) -> tuple[object, ...]:
    return layer.dtype, layer.device, layer.shape[1:], layer.stride()
