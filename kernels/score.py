"""Score cached keys against one virtual query and one magnitude vector per query head."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def score(
    keys: Sequence[torch.Tensor],
    slots: torch.Tensor,
    query: torch.Tensor,
    magnitude: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Scores of every candidate of every due request, for all layers and query heads.

    `score = <query, key> + sum_f magnitude[f] |key_f|`: TriAttention (arXiv 2604.04921) with the
    mean over future offsets folded into the query, so that the cached, rotated key is read as it
    is. Accumulates in float32.

    Args:
        keys: per layer [slots, kv_heads, head_dim], any floating dtype, keys after RoPE.
        slots: int64 [requests, candidates], the slot of each candidate.
        query: float32 [layers, requests, query_heads, head_dim], rotated to each request's step.
        magnitude: float32 [layers, query_heads, head_dim / 2], weight of each pair's modulus.
        pairs: component indices of the pairs, from `frequency_pairs`.

    Returns:
        float32 [layers, requests, query_heads, candidates].

    Raises:
        ValueError: `query` or `magnitude` does not fit the keys.
    """
    layers, requests, query_heads, head_dim = query.shape
    kv_heads = keys[0].shape[1]
    if len(keys) != layers or keys[0].shape[2] != head_dim or query_heads % kv_heads:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit {len(keys)} layers of keys "
            f"{tuple(keys[0].shape)}"
        )
    if magnitude.shape != (layers, query_heads, head_dim // 2):
        raise ValueError(f"magnitude {tuple(magnitude.shape)} does not fit {tuple(query.shape)}")
    group = query_heads // kv_heads
    first, second = pairs
    scores = query.new_empty(layers, requests, query_heads, slots.shape[1])
    for layer, cache in enumerate(keys):
        key = cache[slots].float().transpose(1, 2)
        modulus = torch.hypot(key[..., first], key[..., second])
        grouped_query = query[layer].view(requests, kv_heads, group, head_dim)
        weights = magnitude[layer].view(1, kv_heads, group, head_dim // 2)
        logits = grouped_query @ key.transpose(2, 3) + weights @ modulus.transpose(2, 3)
        scores[layer] = logits.view(requests, query_heads, -1)
    return scores
