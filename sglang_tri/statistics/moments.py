"""Sums over queries and keys before RoPE, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.statistics import Statistics
from sglang_tri.statistics.rope import Rope

# Bytes of one slice of heads as complex numbers; about five such are held beside the sums.
_SLICE_BYTES = 16 << 20


class Moments:
    """Sums of one model's heads in float64, on the device that it runs on.

    Args:
        layers: attention layers, all of one geometry.
        query_heads, kv_heads: heads per layer.
        rope: what the engine has done to queries and keys when they are seen here.
        table: gives the engine's cos and sin, [positions, rotary_dim], halves side by side.
    """

    def __init__(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        rope: Rope,
        table: Callable[[], torch.Tensor],
    ) -> None:
        self.seen = [0] * layers
        self._rope, self._table, device = rope, table, table().device
        self._pairs = frequency_pairs(rope.head_dim, rope.rotary_dim, rope.interleaved, device)
        pairs = rope.head_dim // 2
        queries, keys = (layers, query_heads, pairs), (layers, kv_heads, pairs)
        self._q = torch.zeros(queries, dtype=torch.complex128, device=device)
        self._k = torch.zeros(keys, dtype=torch.complex128, device=device)
        self._abs = torch.zeros(queries, dtype=torch.float64, device=device)
        self._square = torch.zeros(queries, dtype=torch.float64, device=device)
        self._norm = torch.zeros(queries[:2], dtype=torch.float64, device=device)

    def add(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Count some tokens of one layer.

        Args:
            queries: [tokens, query_heads * head_dim], after RoPE, any float dtype.
            keys: [tokens, kv_heads * head_dim], after RoPE.
            positions: [tokens], those that RoPE turned them by.
        """
        self.seen[layer] += len(positions)
        rows = max(1, _SLICE_BYTES // (8 * self._q.shape[1] * self._q.shape[2]))
        for q, k, p in zip(
            queries.split(rows), keys.split(rows), positions.split(rows), strict=True
        ):
            turn = self._turn(p)
            self._k[layer] += self._unrotated(k, turn).sum(0, dtype=torch.complex128)
            pairs = self._unrotated(q, turn)
            square = torch.view_as_real(pairs).square().sum(-1)
            self._q[layer] += pairs.sum(0, dtype=torch.complex128)
            self._abs[layer] += square.sqrt().sum(0, dtype=torch.float64)
            self._square[layer] += square.sum(0, dtype=torch.float64)
            self._norm[layer] += square.sum(-1).sqrt().sum(0, dtype=torch.float64)

    def statistics(self, tokens: int, metadata: dict[str, object]) -> Statistics:
        """Means over all tokens, on the CPU.

        Raises:
            KvPolicyError: a layer has not seen every one of the `tokens`.
        """
        for layer, seen in enumerate(self.seen):
            if seen != tokens:
                raise KvPolicyError(
                    f"--kv-stats auto saw {seen} of {tokens} queries in layer {layer}: this "
                    "model's attention cannot be measured. Give --kv-stats FILE."
                )
        return Statistics(
            q_mean=(self._q / tokens).to(torch.complex64).cpu(),
            q_abs=(self._abs / tokens).float().cpu(),
            q_square=(self._square / tokens).float().cpu(),
            q_norm=(self._norm / tokens).float().cpu(),
            k_mean=(self._k / tokens).to(torch.complex64).cpu(),
            rope=self._rope,
            metadata=metadata,
        )

    def _turn(self, positions: torch.Tensor) -> torch.Tensor:
        """complex64 [tokens, 1, rotary_dim / 2]: what undoes RoPE, as the engine rounded it."""
        cos, sin = self._table()[positions].float().chunk(2, -1)
        return (1 / torch.complex(cos, sin))[:, None]

    def _unrotated(self, heads: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """complex64 [tokens, heads, head_dim / 2]."""
        parts = heads.reshape(len(heads), -1, self._rope.head_dim).float()
        first, second = self._pairs
        pairs = torch.complex(parts[..., first], parts[..., second])
        pairs[..., : turn.shape[-1]] *= turn
        return pairs
