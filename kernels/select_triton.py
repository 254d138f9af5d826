"""The select kernel for GPUs.

The programs of a kept set each aggregate some of its candidates over heads and layers; the one that
arrives last then finds the edge between kept and evicted, digit by digit from the top, and writes
the moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_tri.kernels.device import candidates_of, kernel
from sglang_tri.kernels.moves import Budgets, Moves, Selection
from sglang_tri.kernels.pages import Pages
from sglang_tri.kernels.scores import EPSILON, SPLITS, Scores
from sglang_tri.kernels.workspace import Workspace

# Candidates that one program aggregates, rows of scores that it reads at a time, and candidates
# that are looked at together when the edge is sought.
TILE = 256
_ROWS = 32
_BLOCK = 2048


def select(
    scores: Scores,
    pages: Pages,
    budgets: Budgets,
    selection: Selection,
    earlier: torch.Tensor | None,
    workspace: Workspace,
) -> Moves:
    """See `sglang_tri.kernels.select.select`."""
    shape = scores.layers if selection.by_layer else 1, pages.requests, selection.heads
    moves = Moves(
        workspace.take(*shape, budgets.largest, dtype=torch.int32),
        workspace.take(*shape, budgets.largest, dtype=torch.int32),
        workspace.take(*shape, dtype=torch.int32),
    )
    _launch(scores, pages, budgets, moves, selection, earlier, workspace)
    return moves


def aggregate(
    scores: Scores, pages: Pages, selection: Selection, onto: torch.Tensor, workspace: Workspace
) -> None:
    """See `sglang_tri.kernels.select.aggregate`."""
    none = workspace.take(1, pages.requests, selection.heads, dtype=torch.int32)
    budgets = Budgets(pages.last_page_len, pages.last_page_len, 0)
    moves = Moves(none[..., None], none[..., None], none)
    _launch(scores, pages, budgets, moves, selection, onto, workspace)


def _launch(
    scores: Scores,
    pages: Pages,
    budgets: Budgets,
    moves: Moves,
    selection: Selection,
    earlier: torch.Tensor | None,
    workspace: Workspace,
) -> None:
    layers, requests, heads = moves.count.shape
    rows = earlier
    if rows is None:
        rows = workspace.take(layers, requests, heads, scores.longest, dtype=torch.float32)
    if requests:
        select_kernel[(layers * requests * heads, max(1, triton.cdiv(scores.longest, TILE)))](
            scores.rows,
            scores.moments,
            rows,
            workspace.counters(layers * requests * heads),
            moves.target,
            moves.source,
            moves.count,
            pages.indptr,
            pages.last_page_len,
            pages.skipped,
            budgets.kept,
            budgets.recent,
            scores.longest,
            requests,
            scores.layers,
            budgets.largest,
            int(earlier is not None),
            int(selection.normalize),
            **variant(scores.heads, selection, pages.page_size),
        )


def variant(query_heads: int, selection: Selection, page_size: int) -> dict[str, object]:
    """Constants that the kernel is compiled for; none depends on a round."""
    group = query_heads // selection.heads
    columns = min(_ROWS, triton.next_power_of_2(group))
    return {
        "MODE": {"per-head": 0, "per-layer-per-head": 1, "union": 2}[selection.mode],
        "KEEP_ORDER": selection.keep_order,
        "HEADS": selection.heads,
        "GROUP": group,
        "COLUMNS": columns,
        "LAYERS_AT_ONCE": 1 if selection.by_layer else _ROWS // columns,
        "PAGE_SIZE": page_size,
        "SPLITS": SPLITS,
        "EPSILON": EPSILON,
        "TILE": TILE,
        "BLOCK": _BLOCK,
        "num_warps": 8,
        "num_stages": 3,
    }


@triton.jit
def _normal(score, moments, row, plane, used, SPLITS: tl.constexpr, EPSILON: tl.constexpr):
    """Z-norm of scores [rows, tile] with the moments of their rows."""
    place = moments + row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    used = used[:, None] & (tl.arange(0, SPLITS) < SPLITS)[None, :]
    count = tl.load(place, mask=used, other=0.0)
    mean = tl.load(place + plane, mask=used, other=0.0)
    squares = tl.load(place + 2 * plane, mask=used, other=0.0)
    total = tl.maximum(tl.sum(count, 1), 1.0)
    centre = tl.sum(count * mean, 1) / total
    distance = mean - centre[:, None]
    variance = tl.sum(squares + count * distance * distance, 1) / total
    return (score - centre[:, None]) / (tl.sqrt(variance) + EPSILON)[:, None]


@triton.jit
def _rank(x):
    """uint32 that orders as float32 `x` does, 0 and -0 alike; NaN as -inf."""
    x = tl.where(x == x, x, float("-inf")) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _edge(row, contested, need, BLOCK: tl.constexpr):
    """(edge, ties): the rank of the `need`-th best of a row, and how many of that rank are kept."""
    digit = tl.arange(0, 256)
    edge = tl.full((), 0, tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        found = tl.zeros((256,), tl.int32)
        for start in range(0, contested, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < contested
            rank = _rank(tl.load(row + place, mask=inside, other=0.0))
            if step > 0:
                inside = inside & ((rank >> (shift + 8)) == edge)
            found += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=inside)
        above = tl.sum(found, 0) - tl.cumsum(found, 0)
        here = (above < need) & (above + found >= need)
        edge = (edge << 8) | tl.sum(tl.where(here, digit, 0), 0).to(tl.uint32)
        need -= tl.sum(tl.where(here, above, 0), 0)
    return edge, need


@triton.jit
def _write_moves(
    row,
    target,
    source,
    contested,
    front,
    recent,
    KEEP_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moves that keep the `front` best of `contested`, and the `recent` behind them."""
    edge, ties = _edge(row, contested, front, BLOCK)
    tied, kept, moved, filled = 0, 0, 0, 0
    for start in range(0, contested, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < contested
        rank = _rank(tl.load(row + place, mask=inside, other=0.0))
        tie = (inside & (rank == edge)).to(tl.int32)
        keep = inside & ((rank > edge) | ((tie == 1) & (tied + tl.cumsum(tie, 0) <= ties)))
        keep = keep & (front > 0)
        tied += tl.sum(tie, 0)
        if KEEP_ORDER:
            slot = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
            move = keep & (slot != place)
            entry = moved + tl.cumsum(move.to(tl.int32), 0) - 1
            tl.store(target + entry, slot, mask=move)
            tl.store(source + entry, place, mask=move)
            kept += tl.sum(keep.to(tl.int32), 0)
            moved += tl.sum(move.to(tl.int32), 0)
        else:
            hole = (place < front) & (inside & (keep == 0))
            entry = moved + tl.cumsum(hole.to(tl.int32), 0) - 1
            tl.store(target + entry, place, mask=hole)
            moved += tl.sum(hole.to(tl.int32), 0)
            filler = (place >= front) & keep
            entry = filled + tl.cumsum(filler.to(tl.int32), 0) - 1
            tl.store(source + entry, place, mask=filler)
            filled += tl.sum(filler.to(tl.int32), 0)
    for start in range(0, recent, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(target + moved + place, front + place, mask=place < recent)
        tl.store(source + moved + place, contested + place, mask=place < recent)
    return moved + recent


@kernel
def select_kernel(
    scores,
    moments,
    rows,
    arrived,
    target,
    source,
    moves,
    indptr,
    last_page_len,
    skipped,
    budgets,
    recents,
    longest,
    requests,
    layers,
    most,
    has_earlier,
    normalize,
    MODE: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYERS_AT_ONCE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    EPSILON: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of one kept set's candidates; `most` is 0 where layers are still to come."""
    kept_set = tl.program_id(0)
    head = kept_set % HEADS
    request = kept_set // HEADS % requests
    _, count, _ = candidates_of(indptr, last_page_len, skipped, request, PAGE_SIZE)
    tiles = tl.maximum(tl.cdiv(count, TILE), 1)
    if tl.program_id(1) >= tiles:
        return

    candidate = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = candidate < count
    row = rows + kept_set.to(tl.int64) * longest
    if MODE == 2:
        value = tl.full((TILE,), float("-inf"), tl.float32)
    else:
        value = tl.zeros((TILE,), tl.float32)
    if has_earlier:
        value = tl.load(row + candidate, mask=inside, other=0.0)
    first, last = 0, layers
    if MODE == 1:
        first = kept_set // (HEADS * requests)
        last = first + 1
    read = tl.arange(0, LAYERS_AT_ONCE * COLUMNS)
    plane = (layers * requests).to(tl.int64) * (HEADS * GROUP * SPLITS)
    for start in range(first, last, LAYERS_AT_ONCE):
        layer = start + read // COLUMNS
        # More than one step only where all query heads share one set.
        for first_member in tl.static_range(0, GROUP, COLUMNS):
            member = first_member + read % COLUMNS
            used = (layer < last) & (member < GROUP)
            score_row = ((layer * requests + request).to(tl.int64) * HEADS + head) * GROUP + member
            place = scores + score_row[:, None] * longest + candidate[None, :]
            score = tl.load(place, mask=used[:, None] & inside[None, :], other=float("-inf"))
            if normalize:
                score = _normal(score, moments, score_row, plane, used, SPLITS, EPSILON)
            best = tl.max(tl.reshape(score, (LAYERS_AT_ONCE, COLUMNS, TILE)), 1)
            if MODE == 2:
                value = tl.maximum(value, tl.max(best, 0))
            else:
                some = start + tl.arange(0, LAYERS_AT_ONCE) < last
                value += tl.sum(tl.where(some[:, None], best, 0.0), 0)
    tl.store(row + candidate, value, mask=inside)
    if most > 0:
        # All of this program's rows are written before it counts as arrived.
        tl.debug_barrier()
        if tl.atomic_add(arrived + kept_set, 1, sem="acq_rel") == tiles - 1:
            tl.store(arrived + kept_set, 0)
            budget = tl.load(budgets + request)
            recent = tl.load(recents + request)
            number = 0
            if count > budget:
                number = _write_moves(
                    row,
                    target + kept_set.to(tl.int64) * most,
                    source + kept_set.to(tl.int64) * most,
                    count - recent,
                    budget - recent,
                    recent,
                    KEEP_ORDER,
                    BLOCK,
                )
            tl.store(moves + kept_set, number)
