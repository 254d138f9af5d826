"""SGLang's `torch_native` attention, without computing what a cached prefix has no use for.

The stock backend pads the queries of a prefill with one for each cached token and drops their
results: a prompt that is found whole would still cost its length squared.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


class PrefixAttention(TorchNativeAttnBackend):
    """Queries of new tokens only, where attention is causal and has neither window nor encoder."""

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        """As in SGLang: query and output are [new tokens, heads, head_dim], request by request."""
        windowed = sliding_window_size is not None and sliding_window_size > -1
        if encoder_lens is not None or is_cross_attn or windowed or not causal:
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling,
                enable_gqa,
                causal,
                is_cross_attn,
                sliding_window_size,
            )
        rows, lengths = req_pool_indices.tolist(), seq_lens.tolist()
        news = extend_seq_lens.tolist()
        parts = zip(rows, lengths, query.split(news), output.split(news), strict=True)
        for row, length, queries, result in parts:
            slots = req_to_token[row, :length]
            keys, values = k_cache[slots].to(query.dtype), v_cache[slots].to(query.dtype)
            result.copy_(_attend(queries, keys, values, scaling, enable_gqa))
        return output


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: Any, gqa: bool
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence; all [tokens, heads, head_dim]."""
    prefix = len(keys) - len(queries)
    mask = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(prefix) if prefix else None
    attended: torch.Tensor = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=gqa,
    )
    return attended[0].transpose(0, 1)
