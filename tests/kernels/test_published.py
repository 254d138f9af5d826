"""Scores equal the published per-offset formula, evaluated literally in float64."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_tri import statistics as stats
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.kernels.score import score
from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.virtual_queries import virtual_queries

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "data"
# RoPE of the models that the official files belong to; factor > 1 is YaRN's attention factor.
ROPE_THETA = {
    "qwen3_8b": 1e6,
    "deepseek_r1_distill_llama_8b": 5e5,
    "deepseek_r1_distill_qwen_7b": 1e4,
    "gpt_oss_120b": 1.5e5,
}
LAYERS_TESTED = 2


def made_statistics(layers: int, heads: int, head_dim: int, seed: int = 0) -> stats.Statistics:
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, heads, head_dim // 2)
    mean = torch.complex(*(torch.randn(shape, generator=generator) for _ in range(2)))
    spread = torch.rand(shape, generator=generator)
    return stats.Statistics(mean, mean.abs() + spread, path="made")


def statistics_files() -> list[str]:
    if OFFICIAL.is_dir():
        return sorted(path.stem for path in OFFICIAL.glob("*.pt"))
    return ["made"]  # The official files are not part of the repository.


def load_some_layers(name: str) -> stats.Statistics:
    if name == "made":
        warnings.warn("no official statistics here: using the project's own", stacklevel=1)
        return made_statistics(LAYERS_TESTED, 8, 64)
    whole = stats.load(OFFICIAL / f"{name}.pt")
    return stats.Statistics(
        whole.q_mean[:LAYERS_TESTED], whole.q_abs[:LAYERS_TESTED], path=whole.path
    )


def published_score(
    statistics: stats.Statistics,
    rope: Rope,
    keys: torch.Tensor,
    positions: torch.Tensor,
    logical: int,
    kv_heads: int,
    squared: bool = False,
) -> torch.Tensor:
    """arXiv 2604.04921, offset by offset, from keys [layers, n, kv_heads, D] before RoPE.

    squared: with the variance of a Gaussian query in place of the norm term.
    """
    layers, heads, pairs = statistics.q_mean.shape
    first, second = frequency_pairs(rope.head_dim, rope.rotary_dim, rope.interleaved)
    key = torch.complex(keys[..., first].double(), keys[..., second].double())
    key = key.repeat_interleave(heads // kv_heads, 2)
    frequencies = torch.zeros(pairs, dtype=torch.float64)
    factor = torch.ones(pairs, dtype=torch.float64)
    frequencies[: rope.rotary_dim // 2] = rope.frequencies
    factor[: rope.rotary_dim // 2] = rope.factor
    mean = statistics.q_mean.to(torch.complex128)
    total = torch.zeros(layers, positions.numel(), heads, dtype=torch.float64)
    offsets = [2**k for k in range(17)]
    for offset in offsets:
        phase = (logical - positions + offset).double()[:, None] * frequencies
        turn = torch.polar(torch.ones_like(phase), phase)
        logit = (mean[:, None] * key.conj() * turn[None, :, None]).real
        total += (factor**2 * logit).sum(-1)
    if squared:
        variance = statistics.q_square.double() - mean.abs() ** 2
        # Half of the variance of q k / sqrt(D), of which a pair's real part has half; in its units.
        spread = variance[:, None] * (factor**2 * key.abs()) ** 2
        magnitude = spread.sum(-1) / 4 / math.sqrt(rope.head_dim)
    else:
        spread = statistics.q_abs.double() - mean.abs()
        magnitude = (factor**2 * spread[:, None] * key.abs()).sum(-1)
    return (total / len(offsets) + magnitude).transpose(1, 2)


def rotate(keys: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Keys as the engine caches them: RoPE at their positions, with its factor."""
    first, second = frequency_pairs(rope.head_dim, rope.rotary_dim, rope.interleaved)
    rotated = rope.rotary_dim // 2
    phase = positions.double()[:, None] * rope.frequencies
    turn = torch.polar(torch.full_like(phase, rope.factor), phase)[None, :, None]
    pair = torch.complex(keys[..., first[:rotated]].double(), keys[..., second[:rotated]].double())
    cached = keys.double().clone()
    cached[..., first[:rotated]] = (pair * turn).real
    cached[..., second[:rotated]] = (pair * turn).imag
    return cached.float()


def scores_of(
    cache: list[torch.Tensor],
    slots: torch.Tensor,
    statistics: stats.Statistics,
    rope: Rope,
    logical: int,
    device: torch.device,
    squared: bool = False,
) -> torch.Tensor:
    """float32 [layers, 1, query_heads, candidates], from slot buffers."""
    count = len(slots)
    numbers = torch.tensor([0, count, 1, 0], dtype=torch.int32, device=device)
    indices = slots.int().to(device)
    pages = Pages(numbers[:2], indices, numbers[2:3], numbers[3:], 1, count)
    return score(
        PagedBuffers([layer.to(device) for layer in cache]),
        pages,
        virtual_queries(statistics, rope, device),
        torch.tensor([logical], device=device),
        squared=squared,
    ).rows.cpu()


def compare(
    statistics: stats.Statistics,
    rope: Rope,
    kv_heads: int,
    logical: int,
    device: torch.device,
    tolerance: float,
    squared: bool = False,
) -> None:
    layers, _, head_dim = statistics.shape
    count = 40
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(layers, count, kv_heads, head_dim, generator=generator)
    positions = torch.randperm(logical, generator=generator)[:count]
    expected = published_score(statistics, rope, keys, positions, logical, kv_heads, squared)

    slots = torch.randperm(3 * count, generator=generator)[:count]
    cache = torch.full((layers, 3 * count, kv_heads, head_dim), math.nan)
    cache[:, slots] = rotate(keys, positions, rope)
    actual = scores_of(list(cache), slots, statistics, rope, logical, device, squared)
    scale = expected.abs().max()
    close = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(actual[:, 0].double() / scale, expected / scale, **close)


@pytest.mark.parametrize("factor", [1.0, 1.3465735902799727])
@pytest.mark.parametrize("name", statistics_files())
def test_official_statistics(
    device: torch.device, tolerance: float, name: str, factor: float
) -> None:
    statistics = load_some_layers(name)
    head_dim = statistics.shape[2]
    theta = ROPE_THETA.get(name, 1e4)
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rope = Rope(frequencies, factor, head_dim, False)
    compare(statistics, rope, 4, 20_000, device, tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 64])
def test_partial_rotary_and_pairing(
    device: torch.device, tolerance: float, rotary_dim: int, interleaved: bool
) -> None:
    frequencies = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    rope = Rope(frequencies, 1.2, 64, interleaved)
    compare(
        made_statistics(2, 8, 64),
        rope,
        kv_heads=2,
        logical=5_000,
        device=device,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_variance_for_the_norm_term(device: torch.device, tolerance: float, factor: float) -> None:
    frequencies = 1e4 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    made = made_statistics(2, 8, 64)
    statistics = replace(made, q_square=made.q_abs.square() * 1.5)
    rope = Rope(frequencies, factor, 64, False)
    compare(statistics, rope, 2, 5_000, device, tolerance, squared=True)


@pytest.mark.parametrize("wrong", [1.0, 1.2**2, 1.2**3])
def test_factor_is_squared_once(device: torch.device, wrong: float) -> None:
    """The engine's factor enters once with the query and once with the key, no other way."""
    frequencies = 1e4 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    statistics = made_statistics(1, 4, 64)
    keys = torch.randn(1, 9, 2, 64, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(9)
    right = Rope(frequencies, 1.2, 64, False)
    expected = published_score(statistics, right, keys, positions, 100, 2)
    cache = list(rotate(keys, positions, right))
    wrongly = Rope(frequencies, wrong, 64, False)
    actual = scores_of(cache, positions, statistics, wrongly, 100, device)
    assert (actual[:, 0].double() - expected).abs().max() > 0.01 * expected.abs().max()


def test_long_positions_keep_their_phase(device: torch.device, tolerance: float) -> None:
    frequencies = 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    rope = Rope(frequencies, 1.0, 128, False)
    compare(
        made_statistics(1, 4, 128),
        rope,
        kv_heads=1,
        logical=1_000_000,
        device=device,
        tolerance=tolerance,
    )
