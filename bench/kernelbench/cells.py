"""Measure one cell of the table: each kernel, the whole round, and the baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.kernelbench import baselines
from bench.kernelbench.geometry import (
    Cell,
    Work,
    compact_work,
    round_work,
    score_work,
    select_work,
)
from bench.kernelbench.pool import Pool
from bench.kernelbench.timing import Times, measure
from sglang_tri.kernels.compact import compact
from sglang_tri.kernels.moves import Moves, Selection
from sglang_tri.kernels.score import score
from sglang_tri.kernels.score_triton import BUFFERS
from sglang_tri.kernels.scores import Scores
from sglang_tri.kernels.select import select
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies.base import Candidates
from sglang_tri.policies.triattention import TriAttention
from sglang_tri.round.run import choose, run, slice_requests

LEAST_EQUAL = 0.99
# Plain torch takes time in proportion to the requests; what is measured with fewer is scaled.
TORCH_REQUESTS = 4
OFFSET_REQUESTS = 1
BASELINE_REPEATS = 5
# Operations that score, and the tiles of keys that they hold. The first is the product's.
TWO_BUFFERS = "score, 2 buffers"
SCORES = {"score": BUFFERS, TWO_BUFFERS: 2}


@dataclass(frozen=True)
class Result:
    """One operation in one cell.

    Attributes:
        work: bytes and operations that it takes at least.
        measured_requests: with how many requests it was timed; `times` are of all.
        moved: rows moved in each layer, of all requests and KV heads.
    """

    cell: Cell
    operation: str
    times: Times
    work: Work
    measured_requests: int
    moved: int

    @property
    def bytes_per_second(self) -> float:
        return 1e3 * self.work.bytes / self.times.median

    def percent_of(self, copy: float) -> float:
        """Of a bandwidth in bytes per second."""
        return 100 * self.bytes_per_second / copy


class KeptSetsDiffer(RuntimeError):
    """The product keeps other candidates than plain torch."""


def equal_members(pool: Pool) -> float:
    """The share of one request's kept candidates that plain torch keeps too."""
    candidates = slice_requests(pool.candidates()[0], 0, 1)
    pool.workspace.reset()
    moves = choose(TriAttention(), candidates, len(candidates.keys))
    kept = moves.packed(pool.cell.budget)[0].sort(-1).values
    batch = pool.batch(0, 1)
    expected = baselines.choose(batch, baselines.folded(batch, pool.statistics.queries()))
    shape = *kept.shape[:-1], pool.cell.candidates
    both = [torch.zeros(shape, device=kept.device).scatter_(-1, x, 1) for x in (kept, expected)]
    return float((both[0] * both[1]).sum()) / kept.numel()


def check(pool: Pool) -> float:
    """`equal_members`, checked.

    Raises:
        KeptSetsDiffer: it is below `LEAST_EQUAL`.
    """
    equal = equal_members(pool)
    if equal < LEAST_EQUAL:
        raise KeptSetsDiffer(
            f"{pool.cell.model.name}: {100 * equal:.2f}% of the kept candidates are those of plain "
            f"torch, and at least {100 * LEAST_EQUAL:.0f}% should be."
        )
    return equal


class Operations:
    """Times the operations of one cell over all sets of its pool."""

    def __init__(self, pool: Pool, repeats: int) -> None:
        self.pool, self.cell, self.repeats = pool, pool.cell, repeats
        self.candidates = pool.candidates()
        # As the product's it is there before, so that counters need no launch of their own.
        self.memory = Workspace(None, pool.device)

    def all(self) -> list[Result]:
        """Scores are taken once: select and compact need what comes before them."""
        results = [
            self._result(name, partial(self._score, buffers=buffers), score_work(self.cell))
            for name, buffers in SCORES.items()
        ]
        scores = [self._score(index) for index in range(self.pool.sets)]
        holes, order = (
            [self._select(scores[index], each, keep) for index, each in enumerate(self.candidates)]
            for keep in (False, True)
        )
        for name, moves in (("holes", holes), ("order", order)):
            results += self._of_moves(name, scores, moves, name == "order")
        moved = rows_moved(holes)
        del scores, holes, order
        results.append(self._round(moved))
        return [*results, *self._baselines(moved)]

    def _of_moves(
        self, name: str, scores: list[Scores], moves: list[Moves], keep_order: bool
    ) -> list[Result]:
        moved = rows_moved(moves)
        return [
            self._result(
                f"select, {name}",
                lambda index: self._select(scores[index], self.candidates[index], keep_order),
                select_work(self.cell, moved),
                moved,
            ),
            self._result(
                f"compact, {name}",
                lambda index: compact(
                    self.pool.cache.rows, self.candidates[index].pages, moves[index]
                ),
                compact_work(self.cell, moved),
                moved,
            ),
        ]

    def _result(
        self,
        name: str,
        call: Callable[[int], object],
        work: Work,
        moved: int = 0,
        prepare: Callable[[], None] | None = None,
    ) -> Result:
        times = measure(call, self.pool.sets, self.repeats, self.pool.device, prepare)
        return Result(self.cell, name, times, work, self.cell.requests, moved)

    def _score(self, index: int, buffers: int = BUFFERS) -> Scores:
        some = self.candidates[index]
        if some.queries is None:
            raise ValueError("candidates without queries cannot be scored")
        return score(
            some.keys,
            some.pages,
            some.queries,
            some.logical,
            workspace=self.memory,
            buffers=buffers,
        )

    def _select(self, scores: Scores, some: Candidates, keep_order: bool) -> Moves:
        heads, settings = self.cell.model.kv_heads, some.settings
        selection = Selection(heads, settings.eviction_mode, settings.normalize, keep_order)
        return select(scores, some.pages, some.budgets, selection, workspace=self.memory)

    def _round(self, moved: int) -> Result:
        policy, cache = TriAttention(), self.pool.cache
        work = round_work(self.cell, moved)

        def call(index: int) -> object:
            return run(policy, self.candidates[index], cache)

        return self._result("round", call, work, moved, self.pool.refill)

    def _baselines(self, moved: int) -> list[Result]:
        statistics = self.pool.statistics
        queries = statistics.queries()

        def in_torch(batch: baselines.Batch) -> None:
            baselines.round_in_torch(batch, baselines.folded(batch, queries))

        def per_offset(batch: baselines.Batch) -> None:
            baselines.round_in_torch(batch, baselines.per_offset(batch, statistics))

        return [
            self._baseline("torch round", in_torch, TORCH_REQUESTS, moved),
            self._baseline("per-offset round", per_offset, OFFSET_REQUESTS, moved),
        ]

    def _baseline(
        self, name: str, call: Callable[[baselines.Batch], None], most: int, moved: int
    ) -> Result:
        requests = min(most, self.cell.requests)
        batches = [self.pool.batch(index, requests) for index in range(self.pool.sets)]
        repeats = min(self.repeats, BASELINE_REPEATS)
        times = measure(
            lambda index: call(batches[index]), self.pool.sets, repeats, self.pool.device
        )
        all_times = times.times(self.cell.requests / requests)
        return Result(self.cell, name, all_times, round_work(self.cell, moved), requests, moved)


def rows_moved(moves: list[Moves]) -> int:
    """Rows that a layer moves for all requests and KV heads, in the mean over the sets."""
    return round(sum(int(each.count.sum()) for each in moves) / len(moves))
