"""A paged KV pool with sets of slots, so that no call finds its data in a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.kernelbench.baselines import Batch, Statistics
from bench.kernelbench.geometry import RECENT, Cell
from sglang_tri.config import KvPolicyConfig
from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies.base import Candidates
from sglang_tri.round.run import WORKSPACE_BYTES, KvCache

# Beside the pool and the scores: the workspace, and what the torch baselines take.
RESERVE_BYTES = 3 << 30
_MOST_SETS = 16


def wanted_sets(cell: Cell, l2_bytes: int) -> int:
    """Sets whose scores, the smallest thing that is read, are twice the last-level cache."""
    return max(2, min(_MOST_SETS, -(-2 * l2_bytes // cell.score_bytes)))


def set_bytes(cell: Cell) -> int:
    """K, V and scores of one set."""
    return 2 * cell.key_bytes + cell.score_bytes


def fitting_sets(cell: Cell, l2_bytes: int, free_bytes: int) -> int:
    """Sets to measure with; 0 if not even one fits."""
    fitting = (free_bytes - RESERVE_BYTES) // set_bytes(cell)
    return max(0, min(wanted_sets(cell, l2_bytes), fitting))


@dataclass(frozen=True)
class Pool:
    """Buffers of all layers [slots, kv_heads, head_dim], and slots of each set's requests.

    Attributes:
        slots: int32 [sets, requests, candidates], scattered over the whole pool.
        positions: int64 [requests], logical lengths.
    """

    cell: Cell
    cache: KvCache
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slots: torch.Tensor
    positions: torch.Tensor
    statistics: Statistics
    workspace: Workspace

    @classmethod
    def of(cls, cell: Cell, sets: int, device: torch.device) -> Pool:
        """Random contents; page size 1."""
        torch.manual_seed(0)
        model, count = cell.model, sets * cell.requests * cell.candidates
        shape = count, model.kv_heads, model.head_dim
        keys, values = (
            [
                torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
                for _ in range(model.layers)
            ]
            for _ in range(2)
        )
        slots = torch.randperm(count, device=device).int()
        lengths = 4 * cell.candidates + 37 * torch.arange(cell.requests, device=device)
        return cls(
            cell,
            KvCache.of(keys, values, 1),
            keys,
            values,
            slots.view(sets, cell.requests, cell.candidates),
            lengths,
            Statistics.random(model, device),
            Workspace(WORKSPACE_BYTES, device),
        )

    @property
    def sets(self) -> int:
        return self.slots.shape[0]

    @property
    def device(self) -> torch.device:
        return self.slots.device

    def candidates(self) -> list[Candidates]:
        """A round of the product over each set."""
        queries, cell = self.statistics.queries(), self.cell
        settings = KvPolicyConfig(
            policy="triattention", budget=cell.budget, interval=cell.interval, recent=RECENT
        )
        budgets = Budgets.equal(cell.requests, cell.budget, RECENT, self.device)
        return [
            Candidates(
                settings,
                self.cache.keys,
                self.cache.values,
                None,
                None,
                None,
                self._pages(slots),
                self.positions,
                budgets,
                queries,
                self.workspace,
            )
            for slots in self.slots
        ]

    def batch(self, index: int, requests: int) -> Batch:
        """The first requests of a set, for a baseline."""
        return Batch(
            self.keys,
            self.values,
            self.slots[index, :requests].long(),
            self.positions[:requests],
            self.cell.budget,
            RECENT,
        )

    def refill(self) -> None:
        """New keys: after a round the best already lie in the first slots."""
        for key in self.keys:
            key.normal_()

    def _pages(self, slots: torch.Tensor) -> Pages:
        requests, count = slots.shape
        first = count * torch.arange(requests + 1, dtype=torch.int32, device=slots.device)
        ones = torch.ones(requests, dtype=torch.int32, device=slots.device)
        return Pages(first, slots.flatten(), ones, torch.zeros_like(ones), 1, count)
