"""How much of a round is done at a time, so that its scores fit into the workspace."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.pages import PagedBuffers
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import SPLITS
from sglang_tri.kernels.workspace import ALIGNMENT

# Reserved before the engine sizes its KV pool.
WORKSPACE_BYTES = 64 << 20
# Tensors that a part takes from the workspace, each aligned.
_PIECES = 8


@dataclass(frozen=True)
class Geometry:
    """What a round's memory depends on, apart from its requests.

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
    def of(
        cls, keys: PagedBuffers, queries: Queries | None, by_layer: bool, longest: int, kept: int
    ) -> Geometry:
        """Of rounds over `keys`; without queries each KV head is scored by itself."""
        heads = keys.heads if queries is None else queries.heads
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


@dataclass(frozen=True)
class Parts:
    """Requests that are scored together, and layers that are."""

    requests: int
    layers: int

    @staticmethod
    def smallest(geometry: Geometry) -> int:
        """Bytes of the smallest workspace: a layer of a request at a time."""
        return geometry.fixed_bytes + geometry.layer_bytes + _PIECES * ALIGNMENT

    @classmethod
    def of(cls, size: int, geometry: Geometry) -> Parts:
        """The largest parts that fit into a workspace of `size` bytes.

        Raises:
            KvPolicyError: not even one layer of one request fits.
        """
        room = size - _PIECES * ALIGNMENT
        whole = geometry.fixed_bytes + geometry.layers * geometry.layer_bytes
        if whole <= room:
            return cls(room // whole, geometry.layers)
        layers = (room - geometry.fixed_bytes) // geometry.layer_bytes
        if layers < 1:
            raise KvPolicyError(
                f"--kv-budget {geometry.kept} is too large: scores of {geometry.longest} tokens "
                f"take {cls.smallest(geometry)} bytes in each layer, and {size} are reserved. "
                "Use a smaller --kv-budget or --kv-interval."
            )
        return cls(1, layers)
