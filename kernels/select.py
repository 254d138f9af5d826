"""Choose the kept candidates from scores, and say which rows have to move for it."""

from __future__ import annotations

import torch

from sglang_tri.kernels import select_triton
from sglang_tri.kernels.backend import has_triton
from sglang_tri.kernels.moves import Budgets, Moves, Selection
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.scores import EPSILON, Scores
from sglang_tri.kernels.workspace import Workspace


def select(
    scores: Scores,
    pages: Pages,
    budgets: Budgets,
    selection: Selection,
    earlier: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> Moves:
    """Keep the last `recent` candidates of each request, and the best of the others.

    One launch on a GPU; plain torch on a CPU.

    Args:
        scores: of all layers, or of the last ones.
        pages: the candidates.
        budgets: how many are kept.
        selection: how the best are found.
        earlier: what the layers before came to, see `aggregate`. Changed in place.
        workspace: memory for the result; without it, it is allocated.

    Returns:
        The moves, for `compact`.

    Raises:
        ValueError: heads that do not fit.
    """
    selection.check(scores.heads)
    if has_triton(scores.rows.device):
        memory = Workspace.or_new(workspace, scores.rows.device)
        return select_triton.select(scores, pages, budgets, selection, earlier, memory)
    rows = _aggregated(scores, selection, earlier)
    return _choose(rows, pages.counts(), budgets, selection.keep_order)


def aggregate(
    scores: Scores,
    pages: Pages,
    selection: Selection,
    onto: torch.Tensor,
    workspace: Workspace | None = None,
) -> None:
    """Some layers' share of `select`, where scores of all of them do not fit into memory.

    Args:
        scores: of the layers; the other arguments as in `select`.
        onto: float32 [1, requests, selection.heads, longest], what the layers before came to:
            `selection.aggregation_identity` at first. Changed in place.

    Raises:
        ValueError: as `select`, and mode `per-layer-per-head`, which aggregates no layers.
    """
    selection.check(scores.heads)
    if selection.by_layer:
        raise ValueError(f"mode {selection.mode!r} aggregates no layers: select them one by one")
    if has_triton(scores.rows.device):
        memory = Workspace.or_new(workspace, scores.rows.device)
        select_triton.aggregate(scores, pages, selection, onto, memory)
    else:
        _aggregated(scores, selection, onto)


def _aggregated(scores: Scores, selection: Selection, earlier: torch.Tensor | None) -> torch.Tensor:
    """Rows of the kept sets, in `earlier` if there is any."""
    rows = scores.rows
    if selection.normalize:
        mean, deviation = scores.mean_and_deviation()
        rows = (rows - mean[..., None]) / (deviation + EPSILON)[..., None]
    per_head = rows.unflatten(2, (selection.kv_heads, -1)).amax(3)
    if selection.by_layer:
        return per_head
    if selection.mode == "union":
        best = per_head.amax((0, 2), keepdim=True)
        return best if earlier is None else torch.maximum(earlier, best, out=earlier)
    # The sum ranks as the mean does.
    total = per_head.sum(0, keepdim=True)
    return total if earlier is None else earlier.add_(total)


def _choose(rows: torch.Tensor, counts: torch.Tensor, budgets: Budgets, keep_order: bool) -> Moves:
    most = budgets.largest
    target = torch.zeros(*rows.shape[:3], most, dtype=torch.int32, device=rows.device)
    source, count = torch.zeros_like(target), torch.zeros_like(target[..., 0])
    for request, candidates in enumerate(counts.tolist()):
        kept, recent = int(budgets.kept[request]), int(budgets.recent[request])
        if candidates <= kept:
            continue
        best = keep(rows[:, request, :, :candidates], kept, recent)
        moves = Moves.keeping(best, candidates, recent, keep_order)
        target[:, request, :, :kept] = moves.target
        source[:, request, :, :kept] = moves.source
        count[:, request] = moves.count
    return Moves(target, source, count)


def keep(rows: torch.Tensor, budget: int, recent: int) -> torch.Tensor:
    """Indices of the kept candidates: the last `recent`, and the best of the others.

    The lowest index wins a tie.

    Args:
        rows: float32 [..., candidates].
        budget: candidates kept, at most `candidates`.
        recent: last candidates that are always kept, at most `budget`.

    Returns:
        int64 [..., budget], ascending.

    Raises:
        ValueError: the counts do not fit.
    """
    candidates = rows.shape[-1]
    if not 0 <= recent <= budget <= candidates:
        raise ValueError(f"cannot keep {budget} ({recent} recent) of {candidates} candidates")
    contested = rows[..., : candidates - recent]
    # torch.topk does not say which of equal scores it takes; a stable sort does.
    best = contested.sort(dim=-1, descending=True, stable=True).indices[..., : budget - recent]
    tail = torch.arange(candidates - recent, candidates, device=rows.device)
    return torch.cat([best.sort(-1).values, tail.expand(*best.shape[:-1], recent)], -1)
