"""The KV cache of the state machine."""

from __future__ import annotations

import numpy as np
import torch

from sglang_tri.round.run import KvCache
from tests.histories.plain import HEADS, LAYERS, mix


class Memory:
    """The KV cache: in each slot an entry per layer and head, in K and, altered, in V."""

    def __init__(self, slots: int, page_size: int) -> None:
        whole = torch.zeros(slots, LAYERS, HEADS, 4, dtype=torch.int64)
        keys = [whole[:, layer, :, :2] for layer in range(LAYERS)]
        values = [whole[:, layer, :, 2:] for layer in range(LAYERS)]
        self.cache = KvCache.of(keys, values, page_size)
        self.rows = whole.numpy().view(np.uint64)

    def write(self, slot: int, entry: np.ndarray) -> None:
        self.rows[slot, ..., :2] = entry
        self.rows[slot, ..., 2:] = mix(entry)

    def read(self, slots: np.ndarray) -> np.ndarray:
        """The entries in `slots`; K and V belong together."""
        rows = self.rows[slots]
        assert np.array_equal(rows[..., 2:], mix(rows[..., :2])), "K and V of different tokens"
        return rows[..., :2]
