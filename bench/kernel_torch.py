"""What the kernels are compared with: the same round in plain torch, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.kernel_cells import OFFSETS, RECENT, Pool
from sglang_tri.kernels.scores import EPSILON

# From a layer to the scores of a pool's first requests, float32 [requests, kv_heads, group,
# candidates].
Scorer = Callable[[int], torch.Tensor]


def folded(pool: Pool, requests: int) -> Scorer:
    """Scores with the mean over offsets folded into the query."""
    slots, heads = pool.slots[:requests], pool.cell.model.kv_heads
    rotated = pool.queries.at(pool.candidates.logical[:requests])

    def scores(layer: int) -> torch.Tensor:
        key = pool.keys[layer][slots].float()
        query = rotated[layer].unflatten(1, (heads, -1))
        weight = pool.queries.magnitude[layer].unflatten(0, (heads, -1))
        logit = torch.einsum("rnhd,rhgd->rhgn", key, query)
        return logit + torch.einsum("rnhf,hgf->rhgn", torch.hypot(*key.chunk(2, -1)), weight)

    return scores


def per_offset(pool: Pool, requests: int) -> Scorer:
    """Scores with the cosine and sine of each pair, candidate and offset, as published."""
    slots, heads = pool.slots[:requests], pool.cell.model.kv_heads
    # The candidates are the last tokens before their request's logical length.
    behind = torch.arange(slots.shape[1], 0, -1, device=pool.device).expand_as(slots)
    place = pool.candidates.logical[:requests, None] - behind

    def back(distance: torch.Tensor) -> torch.Tensor:
        """RoPE undone: complex64 [requests, candidates, 1, pairs]."""
        phase = distance[..., None, None] * pool.queries.frequencies
        phase = torch.remainder(phase, 2 * torch.pi).float()
        return torch.polar(torch.ones_like(phase), -phase)

    def scores(layer: int) -> torch.Tensor:
        first, second = pool.keys[layer][slots].float().chunk(2, -1)
        key = torch.complex(first, second) * back(place)
        centre = pool.centre[layer].unflatten(0, (heads, -1)).conj()
        weight = pool.queries.magnitude[layer].unflatten(0, (heads, -1))
        total = torch.einsum("rnhf,hgf->rhgn", torch.hypot(first, second), weight)
        for offset in OFFSETS:
            ahead = key * back(behind + offset)
            total += torch.einsum("rnhf,hgf->rhgn", ahead, centre).real / len(OFFSETS)
        return total

    return scores


def choose(pool: Pool, scores: Scorer) -> torch.Tensor:
    """int64 [requests, kv_heads, budget], ascending: the candidates that are kept."""
    cell = pool.cell
    total = torch.zeros((), device=pool.device)
    for layer in range(cell.model.layers):
        rows = scores(layer)
        deviation, mean = torch.std_mean(rows, -1, correction=0, keepdim=True)
        total = total + ((rows - mean) / (deviation + EPSILON)).amax(2) / cell.model.layers
    front = cell.candidates - RECENT
    best = total[..., :front].topk(cell.budget - RECENT, sorted=False).indices
    tail = torch.arange(front, cell.candidates, device=pool.device)
    return torch.cat([best.sort(-1).values, tail.expand(*best.shape[:-1], -1)], -1)


def round_in_torch(pool: Pool, scorer: Callable[[Pool, int], Scorer], requests: int) -> None:
    """A whole round: the kept rows of each layer are written, in order, into the first slots."""
    kept = choose(pool, scorer(pool, requests))
    heads = torch.arange(kept.shape[1], device=kept.device)[:, None]
    slots = pool.slots[:requests, None]
    source = slots.expand(-1, kept.shape[1], -1).gather(-1, kept)
    for layer in (*pool.keys, *pool.values):
        layer[slots[..., : kept.shape[-1]], heads] = layer[source, heads]
