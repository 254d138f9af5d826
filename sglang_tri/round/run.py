"""Run a round: score, select, compact, in chunks whose scores fit into the workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.compact import compact, joined
from sglang_tri.kernels.moves import Moves, Selection
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import SPLITS
from sglang_tri.kernels.select import aggregate, select
from sglang_tri.kernels.workspace import ALIGNMENT
from sglang_tri.policies.base import Candidates, DirectPolicy, Policy, ScoringPolicy
from sglang_tri.round.plan import Round, upload

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig

# Reserved before the engine sizes its KV pool.
WORKSPACE_BYTES = 64 << 20
# Tensors that a chunk takes from the workspace, each aligned.
_PIECES = 8


def run(
    policy: Policy, candidates: Candidates, cache: KvCache, trace: bool = False
) -> torch.Tensor | None:
    """Score, select and compact the candidates of a round.

    Returns:
        With `trace`, which candidate each slot holds now: int64 [layers or 1, requests, kv_heads or
        1, kept].
    """
    size, layers = RoundSize.of(candidates, policy), len(candidates.keys)
    chunks = ScoringChunks.fitting(candidates.workspace.size, size)
    step = chunks.layers if size.by_layer else layers
    packed = []
    for first in range(0, candidates.pages.requests, chunks.requests):
        requests = slice_requests(candidates, first, first + chunks.requests)
        for layer in range(0, layers, step):
            candidates.workspace.reset()
            moves = choose(policy, slice_layers(requests, layer, layer + step), chunks.layers)
            cache.compact(requests.pages, moves, layer, layer + step)
            if trace:
                # The next chunk takes the memory that the moves lie in.
                packed.append(moves.packed(candidates.budgets.largest))
    if not trace:
        return None
    each = -(-layers // step)
    of_requests = [torch.cat(packed[first : first + each]) for first in range(0, len(packed), each)]
    return torch.cat(of_requests, 1)


def choose(policy: Policy, candidates: Candidates, step: int) -> Moves:
    """Which rows of a chunk move; scores are those of `step` layers at a time."""
    if isinstance(policy, DirectPolicy):
        return policy.moves(candidates)
    if not isinstance(policy, ScoringPolicy):
        raise TypeError(f"{type(policy).__name__} is neither a DirectPolicy nor a ScoringPolicy")
    settings = candidates.settings
    heads, mode = candidates.keys.heads, settings.eviction_mode
    selection = Selection(heads, mode, settings.normalize, policy.keeps_order)
    layers = len(candidates.keys)
    *before, last = range(0, layers, step)
    earlier = _aggregate(policy, candidates, selection, before, step) if before else None
    return select(
        policy.score(slice_layers(candidates, last, layers)),
        candidates.pages,
        candidates.budgets,
        selection,
        earlier,
        candidates.workspace,
    )


def _aggregate(
    policy: ScoringPolicy,
    candidates: Candidates,
    selection: Selection,
    firsts: list[int],
    step: int,
) -> torch.Tensor:
    """What the layers from each of `firsts` on come to, `step` at a time."""
    pages, memory = candidates.pages, candidates.workspace
    shape = (1, pages.requests, selection.heads, pages.longest)
    rows = memory.take(*shape, dtype=torch.float32).fill_(selection.aggregation_identity)
    used = memory.used
    for first in firsts:
        scores = policy.score(slice_layers(candidates, first, first + step))
        aggregate(scores, pages, selection, rows, memory)
        memory.reset(used)
    return rows


@dataclass(frozen=True)
class KvCache:
    """The engine's KV cache.

    Attributes:
        keys, values: of all layers, in the dtype that they are read in.
        rows: K and V of all layers as stored, to be moved as they are; `positions`, too.
        positions: logical positions of cached tokens, see `Candidates`.
        key_scale, value_scale: float32 [layers], what stored rows are to be multiplied by, or None.
    """

    keys: PagedBuffers
    values: PagedBuffers
    rows: list[PagedBuffers]
    positions: PagedBuffers | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        page_size: int,
        dtype: torch.dtype | None = None,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> KvCache:
        """From slot buffers [slots, kv_heads, head_dim], one of each for each layer.

        Args:
            dtype: what keys and values are, where the buffers are stored as plain bytes.
        """
        stored = keys, values
        if dtype is not None:
            keys, values = ([rows.view(dtype) for rows in buffers] for buffers in stored)
        return cls(
            PagedBuffers(keys, page_size),
            PagedBuffers(values, page_size),
            joined(*stored, page_size),
            None,
            key_scale,
            value_scale,
        )

    def with_positions(self) -> KvCache:
        """This cache, which also remembers the position of every token that a round has seen."""
        layers = [torch.zeros_like(layer[..., :1], dtype=torch.int32) for layer in self.keys.layers]
        positions = PagedBuffers(layers, self.keys.page_size)
        return replace(self, rows=[*self.rows, positions], positions=positions)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def place(self, planned: Round) -> None:
        """Remember the positions of the candidates that no round has seen yet."""
        if self.positions is None:
            raise RuntimeError("this cache was made without positions")
        new: list[int] = []
        positions: list[int] = []
        first = 0
        for due in planned.requests:
            new += range(first + due.seen, first + due.candidates)
            positions += range(due.logical - due.candidates + due.seen, due.logical)
            first += due.candidates
        slots = planned.slots[upload(new, torch.int64, self.device)].long()
        column = upload(positions, torch.int32, self.device)[:, None, None]
        for layer in self.positions.layers:
            layer.view(-1, *layer.shape[2:])[slots] = column

    def compact(self, pages: Pages, moves: Moves, first: int, last: int) -> None:
        """Move the rows of layers [first, last)."""
        layers = len(self.keys)
        if last - first >= layers:
            compact(self.rows, pages, moves)
            return
        # K and V may lie one behind the other in one set of buffers.
        parts = [
            rows.slice_layers(start + first, start + min(last, layers))
            for rows in self.rows
            for start in range(0, len(rows), layers)
        ]
        compact(parts, pages, moves)


@dataclass(frozen=True)
class RoundSize:
    """What a round's memory depends on, apart from the number of its requests.

    Attributes:
        layers, query_heads, kv_heads: of the model.
        by_layer: whether each layer has kept sets of its own.
        longest: most candidates of a request.
        kept: most of them that are kept.
    """

    layers: int
    query_heads: int
    kv_heads: int
    by_layer: bool
    longest: int
    kept: int

    @classmethod
    def of(cls, candidates: Candidates, policy: Policy) -> RoundSize:
        """Of a round over `candidates`."""
        longest, kept = candidates.pages.longest, candidates.budgets.largest
        settings, keys, queries = candidates.settings, candidates.keys, candidates.queries
        return cls.for_lengths(policy, settings, keys, queries, longest, kept)

    @classmethod
    def for_lengths(
        cls,
        policy: Policy,
        settings: KvPolicyConfig,
        keys: PagedBuffers,
        queries: Queries | None,
        longest: int,
        kept: int,
    ) -> RoundSize:
        """Of a round with so many candidates; without queries each KV head is scored by itself."""
        heads = keys.heads if queries is None else queries.heads
        by_layer = settings.eviction_mode == "per-layer-per-head"
        by_layer = by_layer and isinstance(policy, ScoringPolicy)
        return cls(len(keys), heads, keys.heads, by_layer, longest, kept)

    @property
    def set_bytes(self) -> int:
        """Aggregated scores and moves of the kept sets of one layer and request."""
        return self.kv_heads * (4 * self.longest + 8 * self.kept + 4)

    @property
    def layer_bytes(self) -> int:
        """What one request takes on top for each layer: scores, moments and kept sets."""
        scores = self.query_heads * (4 * self.longest + 12 * SPLITS)
        return scores + (self.set_bytes if self.by_layer else 0)

    @property
    def fixed_bytes(self) -> int:
        """What one request takes, however many layers there are."""
        return 0 if self.by_layer else self.set_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest workspace: a layer of a request at a time."""
        return self.fixed_bytes + self.layer_bytes + _PIECES * ALIGNMENT

    def check_fits(self, size: int) -> None:
        """Raise `KvPolicyError` if a workspace of `size` bytes is too small."""
        if size < self.least_bytes:
            raise KvPolicyError(
                f"--kv-budget {self.kept} is too large: scores of {self.longest} tokens "
                f"take {self.least_bytes} bytes in each layer, and {size} are reserved. "
                "Use a smaller --kv-budget or --kv-interval."
            )


@dataclass(frozen=True)
class ScoringChunks:
    """How many requests, and how many layers, are scored together."""

    requests: int
    layers: int

    @classmethod
    def fitting(cls, size: int, round_size: RoundSize) -> ScoringChunks:
        """The largest that fit into a workspace of `size` bytes, see `RoundSize.check_fits`."""
        room = size - _PIECES * ALIGNMENT
        whole = round_size.fixed_bytes + round_size.layers * round_size.layer_bytes
        if whole <= room:
            return cls(room // whole, round_size.layers)
        return cls(1, max(1, (room - round_size.fixed_bytes) // round_size.layer_bytes))


def slice_requests(candidates: Candidates, first: int, last: int) -> Candidates:
    """Requests [first, last)."""
    return replace(
        candidates,
        pages=candidates.pages.slice_requests(first, last),
        logical=candidates.logical[first:last],
        budgets=candidates.budgets.slice_requests(first, last),
    )


def slice_layers(candidates: Candidates, first: int, last: int) -> Candidates:
    """Layers [first, last)."""
    last = min(last, len(candidates.keys))
    positions, queries = candidates.positions, candidates.queries
    key_scale, value_scale = candidates.key_scale, candidates.value_scale
    return replace(
        candidates,
        keys=candidates.keys.slice_layers(first, last),
        values=candidates.values.slice_layers(first, last),
        positions=None if positions is None else positions.slice_layers(first, last),
        key_scale=None if key_scale is None else key_scale[first:last],
        value_scale=None if value_scale is None else value_scale[first:last],
        queries=None if queries is None else queries.slice_layers(first, last),
    )
