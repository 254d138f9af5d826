"""Compaction moves exactly the rows that it should: payloads tell layer, page, row and head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_tri.kernels.compact import compact, joined
from sglang_tri.kernels.moves import Moves
from sglang_tri.kernels.pages import PagedBuffers
from tests.kernels.layouts import Paged, paged, sparse

FIXTURES = HealthCheck.function_scoped_fixture
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def ramp(layout: Paged, layers: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes in which every row of every layer differs from all others."""
    shape = layout.buffer(heads, dim * dtype.itemsize)
    count = layers * torch.Size(shape).numel()
    values = torch.arange(count).mul(2_654_435_761).bitwise_right_shift(7).bitwise_and(255)
    return values.to(torch.uint8).view(layers, *shape).view(dtype)


def raw(layer: torch.Tensor) -> torch.Tensor:
    return layer.view(INTEGERS[layer.dtype.itemsize]).cpu()


def random_kept(
    shape: tuple[int, ...], count: int, budget: int, recent: int, seed: int
) -> torch.Tensor:
    """int64 [*shape, budget], ascending, the last `recent` candidates among them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape, count - recent, generator=generator).argsort(-1)
    tail = torch.arange(count - recent, count).expand(*shape, recent)
    return torch.cat([order[..., : budget - recent].sort(-1).values, tail], -1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Paged, int, int, int, int, bool, bool, bool]:
    layout = draw(paged(most=60, requests=3))
    budget = draw(st.integers(1, 30))
    return (
        layout,
        *draw(st.sampled_from([(1, 1), (2, 1), (2, 3)])),
        budget,
        draw(st.integers(0, budget)),
        *(draw(st.booleans()) for _ in range(3)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[FIXTURES])
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_compaction(
    device: torch.device,
    case: tuple[Paged, int, int, int, int, bool, bool, bool],
    dtype: torch.dtype,
) -> None:
    layout, heads, layers, budget, recent, per_head, per_layer, keep_order = case
    sets = layers if per_layer else 1, heads if per_head else 1
    shape = sets[0], len(layout.counts), sets[1], budget
    target, source = (torch.zeros(shape, dtype=torch.int32) for _ in range(2))
    number = torch.zeros(shape[:3], dtype=torch.int32)
    kept: dict[int, torch.Tensor] = {}
    for request, count in enumerate(layout.counts):
        if count <= budget:
            continue
        kept[request] = random_kept(sets, count, budget, recent, layout.seed + request)
        moves = Moves.keeping(kept[request], count, recent, keep_order)
        target[:, request], source[:, request] = moves.target, moves.source
        number[:, request] = moves.count
    before = ramp(layout, 2 * layers, heads, 8, dtype)
    after = before.clone().to(device)
    moves = Moves(*(part.to(device) for part in (target, source, number)))
    compact([layout.buffers(list(after))], layout.pages(device), moves)
    check(layout, before, after, kept, budget, recent, keep_order)


def check(
    layout: Paged,
    before: torch.Tensor,
    after: torch.Tensor,
    kept: dict[int, torch.Tensor],
    budget: int,
    recent: int,
    keep_order: bool,
) -> None:
    touched = torch.zeros(layout.pool, layout.page_size, dtype=torch.bool)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        old, new = layout.by_token(raw(old)), layout.by_token(raw(new))
        for request, sets in kept.items():
            places = layout.places(request)
            for place in places[:budget]:
                touched[place] = True
            for head in range(old.shape[2]):
                row = sets[layer % len(sets), min(head, sets.shape[1] - 1)].tolist()
                wanted = [tuple(old[(*places[index], head)].tolist()) for index in row]
                found = [tuple(new[(*place, head)].tolist()) for place in places[:budget]]
                if keep_order:
                    assert found == wanted
                    continue
                assert sorted(found) == sorted(wanted)
                assert found[budget - recent :] == wanted[budget - recent :]
                first = [tuple(old[(*place, head)].tolist()) for place in places[:budget]]
                stays = [index for index in row if index < budget - recent]
                assert all(found[index] == first[index] for index in stays)
        assert torch.equal(old[~touched], new[~touched])


def run_alone(
    layout: Paged, device: torch.device, dim: int, budget: int, recent: int, keep_order: bool
) -> None:
    """One request, with random kept sets of two heads."""
    (count,) = layout.counts
    kept = random_kept((1, 2), count, budget, recent, 0)
    moves = Moves.keeping(kept, count, recent, keep_order)
    moves = Moves(*(part[:, None].to(device) for part in (moves.target, moves.source, moves.count)))
    before = ramp(layout, 2, 2, dim, torch.bfloat16)
    after = before.clone().to(device)
    compact([layout.buffers(list(after))], layout.pages(device), moves)
    check(layout, before, after, {0: kept}, budget, recent, keep_order)


@pytest.mark.parametrize("keep_order", [False, True])
def test_more_moves_than_a_block(device: torch.device, keep_order: bool) -> None:
    """Rows of later blocks lie where earlier ones go, and the other way round."""
    run_alone(Paged(1, [2], [700], "NHD", 3), device, 32, 400, 30, keep_order)


def test_recent_rows_overlap_their_old_place(device: torch.device) -> None:
    """More recent tokens than are evicted: they slide over themselves."""
    run_alone(Paged(4, [0], [210], "HND", 3), device, 8, 200, 150, False)


def test_keys_and_values_of_different_sizes() -> None:
    keys, values = torch.zeros(8, 2, 16), torch.zeros(8, 2, 8)
    assert [len(part) for part in joined([keys] * 3, [keys] * 3, 4)] == [6]
    assert [len(part) for part in joined([keys] * 3, [values] * 3, 4)] == [3, 3]


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """A pool of more bytes than 32 bits can count, of which only two pages are used."""
    words = 2**30 + 64
    storage = (
        torch.empty(words, dtype=torch.int32, device=device)
        if device.type == "cuda"
        else sparse(words, torch.int32)
    )
    far = words - 64
    layer = storage.as_strided((2, 1, 1, 32), (far, far, 32, 1))
    layer[0], layer[1] = 1, 7
    layout = Paged(1, [0], [2], "NHD", 0)
    pages = layout.pages(device)
    object.__setattr__(pages, "indices", torch.tensor([0, 1], dtype=torch.int32, device=device))
    moves = Moves.keeping(torch.tensor([[[[1]]]]), 2)
    moves = Moves(*(part.to(device) for part in (moves.target, moves.source, moves.count)))
    compact([PagedBuffers([layer])], pages, moves)
    assert layer[0].eq(7).all()
    assert storage[32:64].eq(0).all() or device.type == "cuda"


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    layout = Paged(1, [0], [5], "NHD", 0)
    buffers = layout.buffers([torch.zeros(layout.buffer(2, 8), device=device)] * 3)
    number = torch.zeros(2, 1, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="do not fit 3 layers"):
        compact(
            [buffers], layout.pages(device), Moves(number[..., None], number[..., None], number)
        )
