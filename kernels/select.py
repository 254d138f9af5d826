"""Choose the kept candidates from scores, and say which rows have to move for it."""

from __future__ import annotations

import torch

from sglang_tri.kernels import select_triton
from sglang_tri.kernels.backend import has_triton
from sglang_tri.kernels.moves import Budgets, Moves
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.scores import EPSILON, Scores
from sglang_tri.kernels.workspace import Workspace

MODES = ("per-head", "per-layer-per-head", "union")


def select(
    scores: Scores,
    pages: Pages,
    budgets: Budgets,
    kv_heads: int,
    mode: str,
    normalize: bool = True,
    keep_order: bool = False,
    earlier: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> Moves:
    """Keep the last `recent` candidates of each request, and the best of the others.

    In this order: z-norm of each query head's row, maximum over the query heads of a KV head, and
    the mode: `per-head` takes the mean over layers, `per-layer-per-head` a set for each layer,
    `union` the maximum over all. The lowest index wins a tie. One launch on a GPU; plain torch on
    a CPU.

    Args:
        scores: of all layers, or of the last ones.
        pages: the candidates.
        budgets: how many are kept.
        kv_heads: the number of query heads is a multiple of it.
        mode: one of `MODES`.
        normalize: whether rows are z-normed.
        keep_order: whether the kept rows stay in order; otherwise holes are filled.
        earlier: what the layers before came to, see `aggregate`. Changed in place.
        workspace: memory for the result; without it, it is allocated.

    Returns:
        The moves, for `compact`.

    Raises:
        ValueError: an unknown mode, or heads that do not fit.
    """
    shape = sets(scores, kv_heads, mode)
    if has_triton(scores.rows.device):
        memory = Workspace.or_new(workspace, scores.rows.device)
        return select_triton.select(
            scores, pages, budgets, shape, mode, normalize, keep_order, earlier, memory
        )
    rows = _aggregated(scores, kv_heads, mode, normalize)
    if earlier is not None:
        rows = _merge(earlier, rows, mode)
    return _choose(rows, pages.counts(), budgets, keep_order)


def aggregate(
    scores: Scores,
    pages: Pages,
    kv_heads: int,
    mode: str,
    onto: torch.Tensor,
    normalize: bool = True,
    workspace: Workspace | None = None,
) -> None:
    """Some layers' share of `select`, where scores of all of them do not fit into memory.

    Args:
        scores: of the layers; the other arguments as in `select`.
        onto: float32 [1, requests, kv_heads or 1, longest], what the layers before came to:
            `nothing(mode)` at first. Changed in place.

    Raises:
        ValueError: as `select`, and mode `per-layer-per-head`, which aggregates no layers.
    """
    shape = sets(scores, kv_heads, mode)
    if mode == "per-layer-per-head":
        raise ValueError("mode 'per-layer-per-head' aggregates no layers: select them one by one")
    if has_triton(scores.rows.device):
        memory = Workspace.or_new(workspace, scores.rows.device)
        select_triton.aggregate(scores, pages, shape, mode, normalize, onto, memory)
    else:
        _merge(onto, _aggregated(scores, kv_heads, mode, normalize), mode)


def nothing(mode: str) -> float:
    """What no layers come to."""
    return -torch.inf if mode == "union" else 0.0


def sets(scores: Scores, kv_heads: int, mode: str) -> tuple[int, int, int]:
    """(layers, requests, KV heads) of the kept sets; 1 stands for one set for all."""
    if mode not in MODES:
        raise ValueError(f"unknown selection mode {mode!r}: use one of {', '.join(MODES)}")
    if scores.heads % kv_heads:
        raise ValueError(f"{scores.heads} query heads do not fit {kv_heads} KV heads")
    layers = scores.layers if mode == "per-layer-per-head" else 1
    return layers, scores.rows.shape[1], 1 if mode == "union" else kv_heads


def _aggregated(scores: Scores, kv_heads: int, mode: str, normalize: bool) -> torch.Tensor:
    rows = scores.rows
    if normalize:
        mean, deviation = scores.mean_and_deviation()
        rows = (rows - mean[..., None]) / (deviation + EPSILON)[..., None]
    per_head = rows.unflatten(2, (kv_heads, -1)).amax(3)
    if mode == "per-layer-per-head":
        return per_head
    if mode == "per-head":
        # The sum ranks as the mean does.
        return per_head.sum(0, keepdim=True)
    return per_head.amax((0, 2), keepdim=True)


def _merge(earlier: torch.Tensor, rows: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "union":
        return torch.maximum(earlier, rows, out=earlier)
    return earlier.add_(rows)


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
