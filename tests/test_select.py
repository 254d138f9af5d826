"""Selection against a plain re-statement of each mode, and its corner cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tri.kernels.select import aggregate, normalize, select


def plain_keep(row: list[float], budget: int, recent: int) -> list[int]:
    contested = range(len(row) - recent)
    worth = [-math.inf if math.isnan(row[i]) else row[i] for i in contested]
    best = sorted(contested, key=lambda i: (-worth[i], i))[: budget - recent]
    return sorted(best) + list(range(len(row) - recent, len(row)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_select_equals_plain_sort(data: st.DataObject) -> None:
    row = data.draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, math.nan]), min_size=1))
    budget = data.draw(st.integers(0, len(row)))
    recent = data.draw(st.integers(0, budget))
    kept = select(torch.tensor([row]), budget, recent)
    assert kept[0].tolist() == plain_keep(row, budget, recent)


def test_select_refuses_counts_that_do_not_fit() -> None:
    for budget, recent in ((5, 0), (3, 4), (3, -1)):
        with pytest.raises(ValueError, match="cannot keep"):
            select(torch.zeros(4), budget, recent)


def test_normalize_is_per_row_with_population_deviation() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 20.0, 30.0, 60.0], [5.0] * 4])
    normal = normalize(rows)
    torch.testing.assert_close(normal[0], normal[1], rtol=1e-4, atol=1e-5)
    expected = (rows[0] - 3) / math.sqrt(14 / 4)
    torch.testing.assert_close(normal[0], expected, rtol=1e-4, atol=1e-5)
    assert normal[2].tolist() == [0.0] * 4


def test_modes() -> None:
    scores = torch.randn(3, 2, 4, 7, generator=torch.Generator().manual_seed(0))
    heads = [scores[:, :, 2 * h : 2 * h + 2].amax(2) for h in range(2)]
    per_layer = aggregate(scores, 2, "per-layer-per-head")
    per_head = aggregate(scores, 2, "per-head")
    union = aggregate(scores, 2, "union")
    for h, expected in enumerate(heads):
        assert torch.equal(per_layer[:, :, h], expected)
        torch.testing.assert_close(per_head[0, :, h], expected.mean(0))
    assert torch.equal(union[0, :, 0], torch.stack(heads).amax((0, 1)))
    with pytest.raises(ValueError, match="mode"):
        aggregate(scores, 2, "both")


def test_norm_comes_before_the_group_maximum() -> None:
    """A loud query head must not drown a quiet one: the wrong order keeps another candidate."""
    loud = [100.0, 99.0, 98.0, 97.0, 96.0, 95.0]
    quiet = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    scores = torch.tensor([[[loud, quiet]]])
    right = select(aggregate(normalize(scores), 1, "per-head"), 1, 0)
    wrong = select(normalize(aggregate(scores, 1, "per-head")), 1, 0)
    assert right.flatten().tolist() == [5]
    assert wrong.flatten().tolist() == [0]
