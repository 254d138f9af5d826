"""What `bench.kernels` measures with: shapes of models, least work, and a pool of random KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import SPLITS
from sglang_tri.kernels.workspace import Workspace
from sglang_tri.policies.base import Candidates
from sglang_tri.round.run import WORKSPACE_BYTES, KvCache

RECENT = 16
# Future offsets of the published score (arXiv 2604.04921).
OFFSETS = tuple(2**exponent for exponent in range(17))


class Model(NamedTuple):
    """The attention geometry of a model with a bfloat16 KV cache.

    `group` query heads share a KV head; `theta` is RoPE's base; `parameters` are those of the whole
    model, 2 bytes each.
    """

    name: str
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    theta: float
    parameters: int

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * 2 * self.head_dim

    def tiny(self) -> Model:
        """A model that a CPU can run; the group stays as it is."""
        return self._replace(layers=2, kv_heads=2, head_dim=16, parameters=1000)


_ALL = (
    Model("qwen3-8b", 36, 8, 4, 128, 1e6, 8_190_735_360),
    Model("llama-3-8b", 32, 8, 4, 128, 5e5, 8_030_261_248),
    Model("llama-3-70b", 80, 8, 8, 128, 5e5, 70_553_706_496),
)
MODELS = {model.name: model for model in _ALL}


class Work(NamedTuple):
    """What an operation cannot do without: bytes from and to memory, and operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Cell:
    """A round of `requests` requests with equally many candidates, of which `interval` go."""

    model: Model
    requests: int
    candidates: int
    interval: int = 128

    def __str__(self) -> str:
        return f"{self.model.name}, requests {self.requests}, n {self.candidates}"

    @property
    def budget(self) -> int:
        return self.candidates - self.interval

    @property
    def step_bytes(self) -> int:
        """What a decode step reads at least: the weights, and the kept KV of all requests."""
        kept = self.requests * self.budget * self.model.token_bytes
        return 2 * self.model.parameters + kept

    def work(self, moved: int) -> dict[str, Work]:
        """Of score, select and compact, and of the round, which is all three.

        Score reads keys and queries, and writes scores and moments of each row: two products and a
        modulus for each pair. Select reads these, and writes one aggregated row for each KV head,
        and two indices for each move. Compact reads the indices, and copies rows of K and V.

        Args:
            moved: rows that each layer moves, of all requests and KV heads.
        """
        model, pairs = self.model, self.model.head_dim // 2
        rows = model.layers * self.requests * model.query_heads
        per_head = self.requests * model.kv_heads * self.candidates
        keys = self.requests * self.candidates * model.token_bytes // 2
        scores = 4 * rows * (self.candidates + 3 * SPLITS)
        queries = 4 * model.layers * model.query_heads * 3 * pairs
        products = model.layers * per_head * pairs * (model.group * (4 + 2) + 4)
        parts = {
            "score": Work(keys + queries + scores, products),
            "select": Work(scores + 4 * per_head + 8 * moved, 4 * rows * self.candidates),
            "compact": Work(2 * moved * model.token_bytes // model.kv_heads + 8 * moved),
        }
        return {**parts, "round": Work(*map(sum, zip(*parts.values(), strict=True)))}


class Pool:
    """A KV pool of pages of one token, and a cell's candidates, which lie scattered all over it.

    Contents are random, and always the same.

    Attributes:
        keys, values: per layer bfloat16 [slots, kv_heads, head_dim], in buffers of their own.
        cache: the same for the product.
        slots: int64 [requests, candidates].
        centre: complex64 [layers, query_heads, pairs], mean queries before RoPE.
        queries: with the mean over the offsets folded in.
        candidates: what the product's round is about.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        torch.manual_seed(0)
        self.cell, self.device = cell, device
        model, count = cell.model, cell.requests * cell.candidates
        shape = count, model.kv_heads, model.head_dim
        self.keys, self.values = (
            [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(model.layers)]
            for _ in range(2)
        )
        for rows in self.keys + self.values:
            rows.normal_()
        self.cache = KvCache.of(self.keys, self.values, 1)
        self.slots = torch.randperm(count, device=device).view(cell.requests, -1)
        heads = model.layers, model.query_heads, model.head_dim // 2
        self.centre = torch.complex(*torch.randn(2, *heads, device=device))
        self.queries = self._folded(torch.rand(heads, device=device))
        self.candidates = self._candidates()

    def refill(self) -> None:
        """New keys: after a round the best already lie in the first slots."""
        for rows in self.keys:
            rows.normal_()

    def _folded(self, magnitude: torch.Tensor) -> Queries:
        pairs = magnitude.shape[-1]
        exponent = torch.arange(pairs, dtype=torch.float64, device=self.device) / pairs
        frequencies = self.cell.model.theta**-exponent
        phase = torch.tensor(OFFSETS, device=self.device)[:, None] * frequencies
        mean = self.centre * torch.polar(torch.ones_like(phase), phase).mean(0)
        parts = torch.stack([mean.real, mean.imag], 2).float()
        return Queries(parts, magnitude, frequencies, 2 * pairs, False)

    def _candidates(self) -> Candidates:
        budget, interval, device = self.cell.budget, self.cell.interval, self.device
        settings = KvPolicyConfig("triattention", budget=budget, interval=interval, recent=RECENT)
        requests, count = self.slots.shape
        first = count * torch.arange(requests + 1, dtype=torch.int32, device=device)
        ones = torch.ones(requests, dtype=torch.int32, device=device)
        pages = Pages(first, self.slots.flatten().int(), ones, 0 * ones, 1, count)
        lengths = 4 * count + 37 * torch.arange(requests, device=device)
        budgets = Budgets.equal(requests, budget, RECENT, device)
        memory = Workspace(WORKSPACE_BYTES, device)
        head = settings, self.cache.keys, self.cache.values, None, None, None
        return Candidates(*head, pages, lengths, budgets, self.queries, memory)
