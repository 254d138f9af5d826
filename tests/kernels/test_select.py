"""Selection against a plain re-statement of it, and its corner cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_tri.kernels.moves import MODES, Budgets, Moves, Selection
from sglang_tri.kernels.scores import Scores
from sglang_tri.kernels.select import aggregate, keep, select
from sglang_tri.kernels.workspace import Workspace
from tests.kernels.layouts import Paged

FIXTURES = HealthCheck.function_scoped_fixture
EPSILON = 1e-6


def layout_of(counts: list[int], page_size: int = 4) -> Paged:
    return Paged(page_size, [0] * len(counts), counts, "NHD", 0)


def plain_keep(row: list[float], budget: int, recent: int) -> list[int]:
    """The last `recent`, and the best of the others: the lowest index among equals."""
    if len(row) <= budget:
        return list(range(len(row)))
    contested = range(len(row) - recent)
    best = sorted(contested, key=lambda i: (-row[i], i))[: budget - recent]
    return sorted(best) + list(range(len(row) - recent, len(row)))


def plain_rows(
    rows: torch.Tensor, count: int, heads: int, mode: str, normalize: bool
) -> list[list[list[float]]]:
    """Aggregated scores of one request, by the layers and heads of its kept sets, in float64."""
    scores = rows[..., :count].double()
    scores = scores.where(scores.isfinite(), -math.inf)
    if normalize:
        for layer in scores:
            for row in layer:
                finite = row[row.isfinite()]
                if len(finite):
                    spread = finite.std(correction=0) + EPSILON
                    row.copy_((row - finite.mean()) / spread)
    best = scores.unflatten(1, (heads, -1)).amax(2)
    if mode == "per-head":
        best = best.mean(0, keepdim=True)
    if mode == "union":
        best = best.amax((0, 1), keepdim=True)
    found: list[list[list[float]]] = best.tolist()
    return found


def plain_packed(kept: list[int], count: int, recent: int, keep_order: bool) -> list[int]:
    """Which candidate each slot holds afterwards."""
    budget = len(kept)
    if keep_order or budget == count:
        return kept
    front = budget - recent
    later = [index for index in kept if front <= index < count - recent]
    packed = [index if index in kept else later.pop(0) for index in range(front)]
    return packed + list(range(count - recent, count))


def check(
    rows: torch.Tensor,
    counts: list[int],
    budget: int,
    recent: int,
    heads: int,
    mode: str,
    normalize: bool,
    keep_order: bool,
    device: torch.device,
) -> None:
    layout = layout_of(counts)
    moves = select(
        Scores.of(rows.to(device), torch.tensor(counts, device=device)),
        layout.pages(device),
        Budgets.equal(len(counts), budget, recent, device),
        Selection(heads, mode, normalize, keep_order),
    )
    packed = moves.packed(budget).cpu()
    for request, count in enumerate(counts):
        wanted = plain_rows(rows[:, request], count, heads, mode, normalize)
        for layer, of_layer in enumerate(wanted):
            for head, row in enumerate(of_layer):
                kept = plain_keep(row, budget, recent)
                slots = plain_packed(kept, count, recent, keep_order)
                if count <= budget:
                    assert moves.count[layer, request, head] == 0
                else:
                    assert packed[layer, request, head].tolist() == slots


def few_values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Scores with many ties; sums of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator) / 2


@settings(max_examples=25, deadline=None, suppress_health_check=[FIXTURES])
@given(data=st.data())
def test_against_plain_python(device: torch.device, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    heads, group, layers = data.draw(st.sampled_from([(1, 1, 1), (2, 3, 2), (1, 5, 3)]))
    budget = data.draw(st.integers(1, 20))
    recent = data.draw(st.integers(0, budget))
    rows = few_values(layers, len(counts), heads * group, max(counts), seed=data.draw(SEEDS))
    for value in (math.nan, math.inf, -math.inf, -0.0):
        if rows.numel() and data.draw(st.booleans()):
            rows.view(-1)[data.draw(st.integers(0, rows.numel() - 1))] = value
    mode, keep_order = data.draw(st.sampled_from(MODES)), data.draw(st.booleans())
    check(rows, counts, budget, recent, heads, mode, False, keep_order, device)


SEEDS = st.integers(0, 2**16)


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_normalized(device: torch.device, mode: str, keep_order: bool) -> None:
    """Many candidates, so that several programs share a kept set, and several blocks its edge."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 2, 6, 2_500, generator=generator) * 5 + 100
    check(rows, [2_500, 300], 200, 16, 2, mode, True, keep_order, device)


@pytest.mark.parametrize("mode", MODES)
def test_many_query_heads(device: torch.device, mode: str) -> None:
    """More than a program reads at a time."""
    check(few_values(2, 1, 80, 60), [60], 20, 4, 5, mode, False, False, device)


def test_all_equal(device: torch.device) -> None:
    """The lowest indices are kept, so that nothing but the recent moves."""
    check(torch.zeros(1, 1, 1, 3_000), [3_000], 1_000, 8, 1, "per-head", True, False, device)


def test_ragged_budgets(device: torch.device) -> None:
    counts, kept, recent = [30, 30, 12], [5, 20, 12], [0, 20, 3]
    rows = few_values(1, 3, 1, 30)
    numbers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (kept, recent)]
    moves = select(
        Scores.of(rows.to(device), torch.tensor(counts, device=device)),
        layout_of(counts).pages(device),
        Budgets(*numbers, 20),
        Selection(1, "per-head", normalize=False),
    )
    for request, count in enumerate(counts):
        budget, last = kept[request], recent[request]
        row = rows[0, request, 0, :count].tolist()
        slots = plain_packed(plain_keep(row, budget, last), count, last, False)
        assert moves.packed(20)[0, request, 0, :budget].tolist() == slots


@pytest.mark.parametrize("mode", ["per-head", "union"])
def test_layers_after_one_another(device: torch.device, mode: str) -> None:
    """Aggregated in parts, they keep what they keep together."""
    rows, counts = few_values(5, 2, 4, 300), torch.tensor([300, 170], device=device)
    scores = Scores.of(rows.to(device), counts)
    pages = layout_of([300, 170]).pages(device)
    budgets = Budgets.equal(2, 50, 4, device)
    selection = Selection(2, mode)
    whole = select(scores, pages, budgets, selection)
    heads = 1 if mode == "union" else 2
    earlier = torch.full((1, 2, heads, 300), selection.aggregation_identity, device=device)
    workspace = Workspace(1 << 20, device)
    for first, last in ((0, 2), (2, 4)):
        part = Scores(scores.rows[first:last], scores.moments[:, first:last].contiguous())
        aggregate(part, pages, selection, earlier, workspace)
    rest = Scores(scores.rows[4:], scores.moments[:, 4:].contiguous())
    parts = select(rest, pages, budgets, selection, earlier, workspace)
    assert torch.equal(parts.packed(50), whole.packed(50))
    with pytest.raises(ValueError, match="aggregates no layers"):
        aggregate(rest, pages, Selection(2, "per-layer-per-head"), earlier)


def test_the_same_each_time(device: torch.device) -> None:
    """Also with counters that an earlier selection has used."""
    scores = Scores.of(few_values(2, 2, 4, 600).to(device), torch.tensor([600] * 2, device=device))
    pages, budgets = layout_of([600, 600]).pages(device), Budgets.equal(2, 100, 8, device)
    workspace = Workspace(1 << 20, device)
    found = []
    for _ in range(3):
        workspace.reset()
        moves = select(scores, pages, budgets, Selection(2, "per-head"), workspace=workspace)
        found.append(moves.packed(100).clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_norm_comes_before_the_group_maximum(device: torch.device) -> None:
    """A loud query head must not drown a quiet one: the wrong order keeps another candidate."""
    loud = [100.0, 99.0, 98.0, 97.0, 96.0, 95.0]
    quiet = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    scores = torch.tensor([[[loud, quiet]]], device=device)
    pages, budgets = layout_of([6]).pages(device), Budgets.equal(1, 1, 0, device)
    for normalize, expected in ((True, 5), (False, 0)):
        moves = select(
            Scores.of(scores, torch.tensor([6], device=device)),
            pages,
            budgets,
            Selection(1, "per-head", normalize),
        )
        assert moves.packed(1).flatten().tolist() == [expected]


def test_keep_refuses_counts_that_do_not_fit() -> None:
    for budget, recent in ((5, 0), (3, 4), (3, -1)):
        with pytest.raises(ValueError, match="cannot keep"):
            keep(torch.zeros(4), budget, recent)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    scores = Scores.of(few_values(1, 1, 3, 9).to(device), torch.tensor([9], device=device))
    pages, budgets = layout_of([9]).pages(device), Budgets.equal(1, 4, 1, device)
    with pytest.raises(ValueError, match="mode 'both'"):
        Selection(1, "both")
    with pytest.raises(ValueError, match="3 query heads do not fit 2"):
        select(scores, pages, budgets, Selection(2, "union"))
    with pytest.raises(ValueError, match="cannot keep 3"):
        Budgets.equal(1, 3, 4)


def test_moves_of_kept_sets_are_those_of_selection(device: torch.device) -> None:
    """What a policy without scores says in its own way: `Moves.keeping`."""
    rows = few_values(1, 1, 1, 50)
    for keep_order in (False, True):
        moves = select(
            Scores.of(rows.to(device), torch.tensor([50], device=device)),
            layout_of([50]).pages(device),
            Budgets.equal(1, 20, 4, device),
            Selection(1, "per-head", False, keep_order),
        )
        kept = torch.tensor(plain_keep(rows.flatten().tolist(), 20, 4))
        stated = Moves.keeping(kept[None, None, None], 50, 4, keep_order)
        assert torch.equal(moves.packed(20).cpu(), stated.packed(20))
        assert torch.equal(moves.count.cpu(), stated.count)
