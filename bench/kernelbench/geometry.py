"""What is measured, and the bytes and operations that it takes at least."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_tri.kernels.scores import SPLITS

RECENT = 16
INTERVAL = 128
_FLOAT = 4
_INDEX = 4


@dataclass(frozen=True)
class Model:
    """The attention geometry of a model with a bfloat16 KV cache.

    Attributes:
        layers, kv_heads, group, head_dim: `group` query heads share a KV head.
        theta: RoPE's base.
        parameters: of the whole model, 2 bytes each.
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
    def row_bytes(self) -> int:
        """One head's key, or value, of one token."""
        return 2 * self.head_dim

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.row_bytes

    @property
    def weight_bytes(self) -> int:
        return 2 * self.parameters

    def tiny(self) -> Model:
        """A model that a CPU can run; the group stays as it is."""
        return replace(self, layers=2, kv_heads=2, head_dim=16, parameters=1000)


MODELS = {
    model.name: model
    for model in (
        Model("qwen3-8b", 36, 8, 4, 128, 1e6, 8_190_735_360),
        Model("llama-3-8b", 32, 8, 4, 128, 5e5, 8_030_261_248),
        Model("llama-3-70b", 80, 8, 8, 128, 5e5, 70_553_706_496),
    )
}


@dataclass(frozen=True)
class Cell:
    """A round of `requests` equal requests.

    Attributes:
        candidates: of each request.
        interval: how many of them are evicted.
    """

    model: Model
    requests: int
    candidates: int
    interval: int = INTERVAL

    @property
    def budget(self) -> int:
        return self.candidates - self.interval

    @property
    def key_bytes(self) -> int:
        return self.requests * self.candidates * self.model.token_bytes // 2

    @property
    def score_bytes(self) -> int:
        """float32 [layers, requests, query_heads, candidates], and moments of each row."""
        rows = self.model.layers * self.requests * self.model.query_heads
        return rows * _FLOAT * (self.candidates + 3 * SPLITS)

    @property
    def query_bytes(self) -> int:
        """Real and imaginary parts and magnitudes, float32, read once."""
        pairs = self.model.head_dim // 2
        return self.model.layers * self.model.query_heads * 3 * pairs * _FLOAT


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without: bytes from and to memory, and operations."""

    bytes: int
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def score_work(cell: Cell) -> Work:
    """Reads keys and queries, writes scores. Two products and a modulus for each pair."""
    model = cell.model
    pairs = cell.requests * cell.candidates * model.layers * model.kv_heads * model.head_dim // 2
    flops = pairs * (model.group * (4 + 2) + 4)
    return Work(cell.key_bytes + cell.query_bytes + cell.score_bytes, flops)


def select_work(cell: Cell, moved: int) -> Work:
    """Reads scores, writes one aggregated row for each KV head, and a pair for each move.

    Args:
        moved: moves of all requests and KV heads; one set for all layers.
    """
    model = cell.model
    rows = cell.requests * model.kv_heads * cell.candidates * _FLOAT
    scores = model.layers * cell.requests * model.query_heads * cell.candidates
    return Work(cell.score_bytes + rows + 2 * _INDEX * moved, 4 * scores)


def compact_work(cell: Cell, moved: int) -> Work:
    """Reads and writes the moved rows of K and V in all layers; reads the moves once."""
    rows = 2 * cell.model.layers * moved
    return Work(2 * rows * cell.model.row_bytes + 2 * _INDEX * moved)


def round_work(cell: Cell, moved: int) -> Work:
    """All three, hole-filling; scores are written and read."""
    return score_work(cell) + select_work(cell, moved) + compact_work(cell, moved)
