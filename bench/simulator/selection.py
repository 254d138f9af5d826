"""From a ranking to the kept set, and its comparison with a set recorded elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from .policies import Ranking


@dataclass(frozen=True)
class Selection:
    """The kept sets of one round; shapes as in `Ranking`."""

    index: torch.Tensor
    """Kept candidates: int64 [layers or 1, kv heads or 1, keep], ascending.

    Where sets differ in size, keep is the largest's, and the others begin with -1.
    """
    scores: torch.Tensor
    """float64 [layers or 1, kv heads or 1, n]; infinite where protected."""
    edge: torch.Tensor
    """Lowest kept score, float64 [layers or 1, kv heads or 1]; infinite if none was contested."""
    margin: float
    """Smallest distance over the sets from the edge to the best evicted score; NaN if ragged."""


class RoundMismatch(ValueError):
    """A recorded set is not the oracle's, and not by a near tie.

    `margin` is the largest distance of a differing candidate from the edge, in score units.
    """

    def __init__(self, number: int, layer: int, head: int, margin: float, detail: str) -> None:
        super().__init__(
            f"round {number}, layer {layer}, kv head {head}: {detail} (margin {margin:.3g})"
        )
        self.round = number
        self.layer = layer
        self.head = head
        self.margin = margin


def select(ranking: Ranking, keep: int) -> Selection:
    """Protected candidates and the best of the others; among equals the lowest index."""
    if int(ranking.protected.sum()) > keep:
        raise ValueError(f"{int(ranking.protected.sum())} protected tokens, {keep} places")
    if not bool(torch.isfinite(ranking.scores).all()):
        raise ValueError("scores are not finite")
    scores = ranking.scores.masked_fill(ranking.protected, torch.inf)
    best, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    if ranking.counts is not None:
        return _ragged(scores, best, order, ranking.counts)
    index = order[..., :keep].sort(dim=-1).values
    edge = best[..., keep - 1]
    margin = float((edge - best[..., keep]).min())
    return Selection(index, scores, edge, margin)


def _ragged(
    scores: torch.Tensor, best: torch.Tensor, order: torch.Tensor, counts: torch.Tensor
) -> Selection:
    """The first `counts` [layers, kv heads] of each set in `order`, whose scores are `best`."""
    widest = int(counts.max())
    index = order[..., :widest].masked_fill(torch.arange(widest) >= counts[..., None], -1)
    edge = best.gather(-1, counts[..., None] - 1).squeeze(-1)
    return Selection(index.sort(dim=-1).values, scores, edge, float("nan"))


def apportion(wanted: torch.Tensor, free: torch.Tensor, total: int) -> torch.Tensor:
    """Whole numbers close to `wanted` that add up to `total`, none above `free`: int64 [sets].

    wanted: float [sets], of about that sum; free: int64 [sets], of at least that.
    """
    wanted = torch.minimum(wanted, free)
    counts = wanted.floor().to(torch.int64)
    while (missing := total - int(counts.sum())) > 0:
        room = (wanted - counts).masked_fill(counts >= free, -torch.inf)
        counts[room.topk(min(missing, int((counts < free).sum()))).indices] += 1
    return counts


def reconcile(
    number: int,
    selection: Selection,
    positions: torch.Tensor,
    recorded: torch.Tensor,
    tolerance: float,
) -> tuple[torch.Tensor, int]:
    """The recorded set as an index like `selection.index`, and how many sets differ.

    positions: the candidates' int64 [layers or 1, kv heads or 1, n]; recorded: kept logical
    positions, int64 shaped like `selection.index`, ascending. Raises RoundMismatch unless every
    differing candidate's score lies within `tolerance` of its set's edge.
    """
    shape = selection.index.shape
    if recorded.shape != shape:
        detail = f"shape {list(recorded.shape)}, not {list(shape)}"
        raise RoundMismatch(number, 0, 0, torch.inf, detail)
    index = torch.empty_like(selection.index)
    differing = 0
    for layer, head in product(range(shape[0]), range(shape[1])):
        places, theirs = positions[layer, head], recorded[layer, head]
        index[layer, head] = _locate(number, layer, head, places, theirs)
        odd = _difference(selection.index[layer, head], index[layer, head], len(places))
        if len(odd) == 0:
            continue
        differing += 1
        gaps = (selection.scores[layer, head, odd] - selection.edge[layer, head]).abs()
        # Protected candidates score infinity; without contested ones the edge does, too.
        worst = float(gaps.nan_to_num(nan=torch.inf).max())
        if not worst <= tolerance:
            detail = f"sets differ at positions {places[odd].tolist()}"
            raise RoundMismatch(number, layer, head, worst, detail)
    return index, differing


def _locate(
    number: int, layer: int, head: int, positions: torch.Tensor, recorded: torch.Tensor
) -> torch.Tensor:
    """Candidate indices of recorded positions, which must be candidates, ascending."""
    found = torch.searchsorted(positions, recorded).clamp(max=len(positions) - 1)
    strange = recorded[positions[found] != recorded].tolist()
    if strange:
        raise RoundMismatch(number, layer, head, torch.inf, f"{strange} were not candidates")
    if bool((recorded.diff() <= 0).any()):
        raise RoundMismatch(number, layer, head, torch.inf, "recorded set is not ascending")
    return found


def _difference(one: torch.Tensor, other: torch.Tensor, size: int) -> torch.Tensor:
    """Indices below `size` that are in exactly one of the two sets."""
    marks = torch.zeros(2, size, dtype=torch.bool)
    marks[0, one] = True
    marks[1, other] = True
    return (marks[0] ^ marks[1]).nonzero().flatten()
