"""Run a round: score, select, compact, in parts that fit into the workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sglang_tri.kernels.compact import compact, joined
from sglang_tri.kernels.moves import Moves
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.policies.base import Candidates, Policy


@dataclass(frozen=True)
class Cache:
    """The engine's KV cache.

    Attributes:
        keys: of all layers, in the dtype that scores are computed from.
        rows: K and V of all layers as stored, to be moved as they are.
        key_scale: float32 [layers], what stored keys are to be multiplied by, or None.
    """

    keys: PagedBuffers
    rows: list[PagedBuffers]
    key_scale: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        page_size: int,
        dtype: torch.dtype | None = None,
        key_scale: torch.Tensor | None = None,
    ) -> Cache:
        """From slot buffers [slots, kv_heads, head_dim], one of each for each layer.

        Args:
            dtype: what the keys are, where the buffers are stored as plain bytes.
        """
        readable = [key if dtype is None else key.view(dtype) for key in keys]
        return cls(PagedBuffers(readable, page_size), joined(keys, values, page_size), key_scale)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def compact(self, pages: Pages, moves: Moves, layers: range) -> None:
        """Move the rows of some layers."""
        if len(layers) == len(self.keys):
            compact(self.rows, pages, moves)
            return
        # K and V may lie one behind the other in one set of buffers.
        parts = [
            cache.part(first + layers.start, first + layers.stop)
            for cache in self.rows
            for first in range(0, len(cache), len(self.keys))
        ]
        compact(parts, pages, moves)


def execute(
    policy: Policy, candidates: Candidates, cache: Cache, trace: bool = False
) -> torch.Tensor | None:
    """Run a round.

    Returns:
        With `trace`, which candidate each slot holds now: int64 [layers or 1, requests, kv_heads or
        1, kept].
    """
    parts = candidates.parts()
    layers = parts.layers if policy.by_layer(candidates.settings) else candidates.layers
    packed = []
    for first in range(0, candidates.pages.requests, parts.requests):
        some = candidates.of_requests(first, first + parts.requests)
        for moves in _run(policy, some, cache, layers):
            if trace:
                # The next part takes the memory that the moves lie in.
                packed.append(moves.packed(candidates.budgets.largest))
    if not trace:
        return None
    each = -(-candidates.layers // layers)
    of_requests = [torch.cat(packed[first : first + each]) for first in range(0, len(packed), each)]
    return torch.cat(of_requests, 1)


def _run(policy: Policy, candidates: Candidates, cache: Cache, step: int) -> Iterator[Moves]:
    for first in range(0, candidates.layers, step):
        layers = range(first, min(first + step, candidates.layers))
        candidates.workspace.reset()
        moves = policy.moves(candidates.of_layers(layers.start, layers.stop))
        cache.compact(candidates.pages, moves, layers)
        yield moves
