"""The score kernel against its formula in float64, over random layouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.score import score
from sglang_tri.kernels.scores import Scores
from tests.kernels.layouts import Paged, paged, sparse

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
CPU = torch.device("cpu")
FIXTURES = HealthCheck.function_scoped_fixture
SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[FIXTURES])


@pytest.fixture(params=["torch", "triton", "triton, 2 buffers"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def buffers(backend: str) -> int:
    return 2 if backend.endswith("2 buffers") else 1


def make_queries(
    layers: int, heads: int, head_dim: int, rotary_dim: int, interleaved: bool
) -> Queries:
    generator = torch.Generator().manual_seed(heads * head_dim)
    shape = layers, heads, 2, head_dim // 2
    rotated = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    still = torch.zeros((head_dim - rotary_dim) // 2, dtype=torch.float64)
    return Queries(
        torch.randn(shape, generator=generator),
        torch.rand(layers, heads, head_dim // 2, generator=generator),
        torch.cat([rotated, still]),
        rotary_dim,
        interleaved,
        torch.rand(layers, heads, head_dim // 2, generator=generator),
    )


def on(queries: Queries, device: torch.device) -> Queries:
    moved = {name: part.to(device) for name, part in vars(queries).items() if torch.is_tensor(part)}
    return replace(queries, **moved)


def make_keys(layout: Paged, layers: int, heads: int, dim: int, dtype: torch.dtype) -> list:
    """NaN everywhere but in the candidates: nothing else may be read into a score."""
    generator = torch.Generator().manual_seed(layout.seed)
    keys = []
    for _ in range(layers):
        layer = torch.full(layout.buffer(heads, dim), math.nan)
        for request in range(len(layout.counts)):
            for page, row in layout.places(request):
                key = torch.randn(heads, dim, generator=generator)
                layout.by_token(layer)[page, row] = key
        keys.append(layer.to(dtype))
    return keys


def expected(
    layout: Paged,
    keys: list[torch.Tensor],
    queries: Queries,
    positions: list[int],
    squared: bool = False,
) -> list[torch.Tensor]:
    """For each request float64 [layers, query_heads, candidates]."""
    first, second = frequency_pairs(
        2 * queries.pairs, queries.rotary_dim, queries.interleaved, "cpu"
    )
    found = []
    for request, position in enumerate(positions):
        places = layout.places(request)
        angle = position * queries.frequencies
        centre = torch.complex(*queries.centre.double().unbind(2)) * torch.polar(
            torch.ones_like(angle), angle
        )
        layers = []
        for layer, buffer in enumerate(keys):
            rows = [layout.by_token(buffer.double())[place] for place in places]
            heads = buffer.shape[2 if layout.layout == "NHD" else 1]
            key = torch.stack(rows, 1) if rows else torch.zeros(heads, 0, 2 * queries.pairs)
            key = key.double().repeat_interleave(queries.heads // heads, 0)
            pair = torch.complex(key[..., first], key[..., second])
            logit = torch.einsum("hf,hnf->hn", centre[layer], pair.conj()).real
            weight = (queries.variance if squared else queries.magnitude)[layer].double()
            modulus = pair.abs() ** (2 if squared else 1)
            layers.append(logit + torch.einsum("hf,hnf->hn", weight, modulus))
        found.append(torch.stack(layers))
    return found


def agree(found: Scores, wanted: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    """Scores and moments; the tolerance is relative to the largest score."""
    mean, deviation = (moment.cpu().double() for moment in found.mean_and_deviation())
    for request, scores in enumerate(wanted):
        count = scores.shape[-1]
        if not count:
            continue
        scale = float(scores.abs().max())
        close = {"rtol": 0, "atol": tolerance * scale}
        rows = found.rows[:, request, :, :count].cpu().double()
        torch.testing.assert_close(rows, scores, **close)
        torch.testing.assert_close(mean[:, request], scores.mean(-1), **close)
        torch.testing.assert_close(deviation[:, request], scores.std(-1, correction=0), **close)


def run(
    layout: Paged,
    dtype: torch.dtype,
    queries: Queries,
    kv_heads: int,
    device: torch.device,
    buffers: int = 1,
    scale: torch.Tensor | None = None,
    squared: bool = False,
) -> None:
    keys = make_keys(layout, queries.layers, kv_heads, 2 * queries.pairs, dtype)
    positions = [7 + 30_011 * request for request in range(len(layout.counts))]
    on_device = on(queries, device)
    found = score(
        layout.buffers([layer.to(device) for layer in keys]),
        layout.pages(device),
        on_device,
        torch.tensor(positions, device=device),
        None if scale is None else scale.to(device),
        squared=squared,
        buffers=buffers,
    )
    readable = [layer.float() for layer in keys]
    if scale is not None:
        readable = [layer * factor for layer, factor in zip(readable, scale, strict=True)]
    agree(found, expected(layout, readable, queries, positions, squared))


@SLOW
@given(layout=paged(), dtype=st.sampled_from(DTYPES))
def test_layouts_and_dtypes(
    device: torch.device, buffers: int, layout: Paged, dtype: torch.dtype
) -> None:
    run(layout, dtype, make_queries(2, 4, 64, 64, False), 2, device, buffers)


FIXED = Paged(4, [3, 0, 0, 9], [70, 0, 1, 33], "NHD", 5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_sizes(device: torch.device, buffers: int, head_dim: int) -> None:
    run(FIXED, torch.bfloat16, make_queries(1, 4, head_dim, head_dim, False), 2, device, buffers)


@pytest.mark.parametrize("group", range(1, 17))
def test_group_sizes(device: torch.device, buffers: int, group: int) -> None:
    run(FIXED, torch.bfloat16, make_queries(1, 2 * group, 64, 64, False), 2, device, buffers)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 32), (80, 80), (96, 24), (128, 64)])
def test_partial_rotary_and_pairing(
    device: torch.device, buffers: int, head_dim: int, rotary_dim: int, interleaved: bool
) -> None:
    run(
        FIXED,
        torch.float16,
        make_queries(1, 3, head_dim, rotary_dim, interleaved),
        1,
        device,
        buffers,
    )


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_of_keys(
    device: torch.device, buffers: int, dtype: torch.dtype, squared: bool
) -> None:
    scale = torch.tensor([0.25, 3.0])
    run(FIXED, dtype, make_queries(2, 4, 64, 64, False), 2, device, buffers, scale, squared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_of_moduli(device: torch.device, buffers: int, dtype: torch.dtype) -> None:
    run(FIXED, dtype, make_queries(2, 6, 80, 48, False), 2, device, buffers, squared=True)


def test_squares_of_moduli_need_weights_of_their_own() -> None:
    queries = make_queries(1, 2, 64, 64, False)
    with pytest.raises(ValueError, match="do not fit together"):
        replace(queries, variance=torch.zeros(1, 2, 31))
    with pytest.raises(ValueError, match="no variance"):
        run(FIXED, torch.float32, replace(queries, variance=None), 1, CPU, squared=True)


def test_more_candidates_than_a_stretch(device: torch.device, buffers: int) -> None:
    """Each program scores several blocks, and the last one has fewer."""
    layout = Paged(16, [5, 0], [1_300, 580], "HND", 1)
    run(layout, torch.bfloat16, make_queries(1, 2, 64, 64, False), 1, device, buffers)


def test_moments_survive_a_large_mean(device: torch.device, buffers: int) -> None:
    """Squares would cancel: the keys are alike, their scores far from zero."""
    queries = make_queries(1, 1, 64, 64, False)
    keys = 30 + torch.randn(300, 1, 64, generator=torch.Generator().manual_seed(0)) * 1e-2
    layout = Paged(1, [0], [300], "NHD", 0)
    page = layout.pages()
    buffer = torch.zeros(layout.pool, 1, 1, 64)
    buffer[page.indices.long(), 0] = keys
    found = score(
        layout.buffers([buffer.to(device)]),
        layout.pages(device),
        on(queries, device),
        torch.tensor([11], device=device),
        buffers=buffers,
    )
    (wanted,) = expected(layout, [buffer], queries, [11])
    deviation = found.mean_and_deviation()[1].cpu()
    assert float(wanted.mean().abs()) > 100 * float(wanted.std())
    torch.testing.assert_close(
        deviation[:, 0].double(), wanted.std(-1, correction=0), rtol=2e-2, atol=0
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_the_lowest(
    device: torch.device, buffers: int, bad: float
) -> None:
    """And it spoils neither the moments nor other scores of its row."""
    queries = make_queries(1, 2, 64, 64, False)
    layout = Paged(1, [0], [40], "NHD", 3)
    (keys,) = make_keys(layout, 1, 1, 64, torch.float32)
    spoiled = keys.clone()
    spoiled[layout.places(0)[7]] = bad
    on_device = on(queries, device)
    found = score(
        layout.buffers([spoiled.to(device)]),
        layout.pages(device),
        on_device,
        torch.tensor([5], device=device),
        buffers=buffers,
    )
    rows = found.rows[0, 0].cpu()
    assert rows[:, 7].tolist() == [-math.inf] * 2
    others = [n for n in range(40) if n != 7]
    (wanted,) = expected(layout, [keys], queries, [5])
    scale = float(wanted.abs().max())
    torch.testing.assert_close(
        rows[:, others].double(), wanted[0][:, others], rtol=0, atol=2e-5 * scale
    )
    mean, deviation = found.mean_and_deviation()
    close = {"rtol": 0, "atol": 2e-5 * scale}
    torch.testing.assert_close(mean[0, 0].cpu().double(), wanted[0][:, others].mean(-1), **close)
    torch.testing.assert_close(
        deviation[0, 0].cpu().double(), wanted[0][:, others].std(-1, correction=0), **close
    )


@pytest.mark.parametrize("part", ["token", "page"])
def test_offsets_beyond_two_to_the_31(device: torch.device, buffers: int, part: str) -> None:
    """Large strides over little memory: element and byte offsets need 64 bits."""
    far, page_size = 2**31 + 64, 1 if part == "page" else 2
    storage = torch.empty(0, dtype=torch.bfloat16, device=device)
    storage = (
        storage.new_empty(2 * far + 64)
        if device.type == "cuda"
        else sparse(2 * far + 64, torch.bfloat16)
    )
    strides = (far, far, 64, 1) if part == "page" else (64, far, 64, 1)
    layer = storage.as_strided((2, page_size, 1, 64), strides)
    layout = Paged(page_size, [0], [2], "NHD", 0)
    pages = layout.pages(device)
    key = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    indices = torch.tensor([0, 1] if part == "page" else [0], dtype=torch.int32, device=device)
    object.__setattr__(pages, "indices", indices)
    for token in range(2):
        place = (token, 0) if part == "page" else (0, token)
        layer[place[0], place[1], 0] = key[token].to(device)
    queries = make_queries(1, 1, 64, 64, False)
    on_device = on(queries, device)
    position = torch.tensor([9], device=device)
    found = score(layout.buffers([layer]), pages, on_device, position, buffers=buffers)
    simple = Paged(1, [0], [2], "NHD", 0)
    dense = torch.zeros(simple.buffer(1, 64), dtype=torch.bfloat16)
    for token, place in enumerate(simple.places(0)):
        dense[place] = key[token]
    agree(found, expected(simple, [dense], queries, [9]))


def test_what_does_not_fit_is_refused() -> None:
    queries = make_queries(1, 4, 64, 64, False)
    pages, position = FIXED.pages(), torch.zeros(4, dtype=torch.int64)
    key = torch.zeros(FIXED.buffer(2, 64))
    fits = FIXED.buffers([key])
    with pytest.raises(ValueError, match="fit 2 layers"):
        score(FIXED.buffers([key, key]), pages, queries, position)
    with pytest.raises(ValueError, match="1 to 16"):
        score(fits, pages, make_queries(1, 34, 64, 64, False), position)
    with pytest.raises(ValueError, match="int32"):
        score(FIXED.buffers([key.int()]), pages, queries, position)
    with pytest.raises(ValueError, match="key_scale"):
        score(fits, pages, queries, position, torch.ones(2))
    with pytest.raises(ValueError, match="use 1 or 2"):
        score(fits, pages, queries, position, buffers=3)
    with pytest.raises(ValueError, match="layers differ"):
        FIXED.buffers([key, key.half()])
    with pytest.raises(ValueError, match="pages of 4"):
        FIXED.buffers([torch.zeros(3, 5, 2, 64)])
