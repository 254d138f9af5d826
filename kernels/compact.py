"""Move the kept rows of K and V into the first slots of each request's region, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def packing(kept: torch.Tensor, candidates: int, recent: int, keep_order: bool) -> torch.Tensor:
    """Which candidate each of the first `budget` slots holds afterwards.

    With `keep_order` the slots stay in logical order. Without it a kept row that already lies in
    the first `budget - recent` slots stays where it is, and only the holes are filled. Either way
    the last `recent` candidates end up, in order, in the last `recent` of the slots.

    Args:
        kept: int64 [..., budget], ascending, its last `recent` entries the last candidates.
        candidates: candidates of each request; `candidates - recent >= budget` without order.
        recent: as above.
        keep_order: as above.

    Returns:
        int64 [..., budget]; entry b is the index of the candidate that slot b receives.
    """
    if keep_order:
        return kept
    budget = kept.shape[-1]
    front = budget - recent
    is_kept = torch.zeros(*kept.shape[:-1], candidates, dtype=torch.bool, device=kept.device)
    is_kept.scatter_(-1, kept, True)
    hole = ~is_kept[..., :front]
    staying = front - hole.sum(-1, keepdim=True)
    filler = (staying + hole.cumsum(-1) - 1).clamp(0, max(budget - 1, 0))
    here = torch.arange(front, device=kept.device).expand_as(hole)
    packed = torch.where(hole, kept.gather(-1, filler), here)
    return torch.cat([packed, kept[..., front:]], -1)


def compact(caches: Sequence[torch.Tensor], slots: torch.Tensor, packed: torch.Tensor) -> None:
    """Copy rows within each cache so that slot b of a request holds candidate `packed[b]`.

    Args:
        caches: per layer [slots, kv_heads, head_dim]; K and V alike, any dtype. Changed in place.
        slots: int64 [requests, candidates], the slot of each candidate.
        packed: int64 [layers or 1, requests, kv_heads or 1, budget], from `packing`.
    """
    kv_heads = caches[0].shape[1]
    shared = packed.shape[0] == 1
    moves = _moves(packed[0], slots, kv_heads)
    for layer, cache in enumerate(caches):
        if not shared and layer:
            moves = _moves(packed[layer], slots, kv_heads)
        target, source, head = moves
        # The gather on the right is complete before the first row is written.
        cache[target, head] = cache[source, head]


def _moves(
    packed: torch.Tensor, slots: torch.Tensor, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(target slot, source slot, head) of the rows to copy in one layer, of equal shapes."""
    budget = packed.shape[-1]
    packed = packed.expand(-1, kv_heads, -1)
    head = torch.arange(kv_heads, device=packed.device)[:, None].expand_as(packed)
    place = torch.arange(budget, device=packed.device).expand_as(packed)
    target = slots[:, None].expand(-1, kv_heads, -1)[..., :budget]
    source = slots[:, None].expand(-1, kv_heads, -1).gather(-1, packed)
    if not packed.is_cpu:
        # Only the device knows which rows move, and asking it would be a synchronisation.
        return target, source, head
    moving = packed != place
    return target[moving], source[moving], head[moving]
