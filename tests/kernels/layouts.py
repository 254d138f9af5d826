"""Random paged layouts: pages anywhere in the pool, requests of any length, prompts in front."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from sglang_tri.kernels.pages import PagedBuffers, Pages

PAGE_SIZES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Paged:
    """Candidates of some requests in a pool of pages.

    Attributes:
        page_size: tokens per page.
        prompts, counts: of each request the leading tokens, and the candidates behind them.
        layout: of the buffers.
        seed: of the order of pages, and of what the buffers hold.
    """

    page_size: int
    prompts: list[int]
    counts: list[int]
    layout: str
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request; one without candidates has no pages if it has no prompt."""
        return [a + b for a, b in zip(self.prompts, self.counts, strict=True)]

    @property
    def page_counts(self) -> list[int]:
        return [-(-length // self.page_size) for length in self.lengths]

    @property
    def pool(self) -> int:
        """Pages of the pool; some belong to nobody."""
        return sum(self.page_counts) + 3

    def pages(self, device: torch.device | str = "cpu") -> Pages:
        generator = torch.Generator().manual_seed(self.seed)
        owned = torch.randperm(self.pool, generator=generator)[: sum(self.page_counts)]
        ends = torch.tensor([0, *self.page_counts]).cumsum(0)
        last = [(n - 1) % self.page_size + 1 if n else 0 for n in self.lengths]
        return Pages(
            *(
                torch.as_tensor(values).int().to(device)
                for values in (ends, owned, last, self.prompts)
            ),
            self.page_size,
            max(self.counts, default=0),
        )

    def places(self, request: int) -> list[tuple[int, int]]:
        """(page, row) of each candidate of one request, spelled out."""
        pages = self.pages()
        first, prompt = int(pages.indptr[request]), self.prompts[request]
        return [
            (int(pages.indices[first + token // self.page_size]), token % self.page_size)
            for token in range(prompt, prompt + self.counts[request])
        ]

    def buffer(self, heads: int, head_dim: int) -> tuple[int, int, int, int]:
        """Shape of one layer's buffer."""
        if self.layout == "HND":
            return self.pool, heads, self.page_size, head_dim
        return self.pool, self.page_size, heads, head_dim

    def buffers(self, layers: list[torch.Tensor]) -> PagedBuffers:
        return PagedBuffers(layers, self.page_size, self.layout)  # type: ignore[arg-type]

    def by_token(self, layer: torch.Tensor) -> torch.Tensor:
        """The layer as [pages, page_size, heads, head_dim]."""
        return layer.transpose(1, 2) if self.layout == "HND" else layer


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the host's memory, of which only what is written takes room."""
    size = elements * dtype.itemsize
    whole = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(whole, dtype=dtype)


@st.composite
def paged(draw: st.DrawFn, most: int = 90, requests: int = 4) -> Paged:
    """Ragged, empty and one-token requests among others."""
    length = st.one_of(st.just(0), st.just(1), st.integers(2, most))
    counts = draw(st.lists(length, min_size=1, max_size=requests))
    prompts = draw(st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts)))
    return Paged(
        draw(st.sampled_from(PAGE_SIZES)),
        [prompt if count else 0 for prompt, count in zip(prompts, counts, strict=True)],
        counts,
        draw(st.sampled_from(["NHD", "HND"])),
        draw(st.integers(0, 2**16)),
    )
