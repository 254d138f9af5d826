"""Every term of the score's variants against its formula, written out here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from bench.simulator import Candidates, Stats
from bench.simulator.selection import select
from bench.simulator.variants import ByConcentration, Terms, Variant


def variant_scores(
    terms: Terms, square: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Stats]:
    """Scores [2, n] of 9 random keys for 2 query heads, with keys, values and statistics."""
    generator = torch.Generator().manual_seed(8)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, values = rand(1, 1, 9, 8), rand(1, 1, 9, 8)
    mean = torch.complex(rand(1, 2, 4), rand(1, 2, 4))
    stats = Stats(mean, mean.abs() + rand(1, 2, 4).abs(), square)
    rope = SimpleNamespace(
        pairs=lambda x: torch.complex(*x.chunk(2, dim=-1)),
        omega=torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64),
        scale=torch.full((4,), 1.2, dtype=torch.float64),
    )
    at = torch.arange(9).expand(1, 1, 9) + 20
    some = Candidates(keys, values, at, 40, 5, rope, stats)  # type: ignore[arg-type]
    return Variant(5, 4, terms, recent=2).scores(some)[0, 0], keys[0, 0], values[0, 0], stats


def test_variants_leave_out_and_add_terms() -> None:
    published, keys, values, stats = variant_scores(Terms())
    trigonometric, *_ = variant_scores(Terms(spread="none"))
    norm, *_ = variant_scores(Terms(trigonometric=False))
    assert torch.allclose(published, trigonometric + norm)
    pairs = torch.complex(*keys.chunk(2, dim=-1))
    omega = [1.0, 0.3, 0.1, 0.03]
    logits = torch.zeros(17, 2, 9, dtype=torch.float64)
    for number, offset in enumerate(2**i for i in range(17)):
        for head in range(2):
            for n in range(9):
                for f in range(4):
                    turn = complex(math.cos(omega[f] * (20 - n + offset)), 0) + 1j * math.sin(
                        omega[f] * (20 - n + offset)
                    )
                    product = complex(stats.mean[0, head, f]) * complex(pairs[n, f]).conjugate()
                    logits[number, head, n] += 1.44 * (product * turn).real
    assert torch.allclose(trigonometric, logits.mean(0))
    greatest, *_ = variant_scores(Terms(spread="none", offsets="max"))
    assert torch.allclose(greatest, logits.amax(0))
    weighted, *_ = variant_scores(Terms(values=True))
    contributed = ((weighted - published) / 8**0.5).exp()
    assert torch.allclose(contributed, values.norm(dim=-1).expand(2, 9))


def test_second_moments_give_the_expected_exponentiated_logit() -> None:
    """Of Gaussian queries around their mean, against a million drawn ones."""
    _, keys, _, stats = variant_scores(Terms())
    deviation = torch.tensor([[[0.9, 0.2, 0.5, 0.1], [0.3, 0.3, 0.8, 0.6]]]).double()
    square = stats.mean.abs().square() + deviation.square()
    both, *_ = variant_scores(Terms(spread="both"), square)
    published, *_ = variant_scores(Terms())
    alone, *_ = variant_scores(Terms(trigonometric=False, spread="variance"), square)
    assert torch.allclose(both - published, alone)
    drawn = torch.randn(1_000_000, 8, generator=torch.Generator().manual_seed(1)).double()
    for head in range(2):
        spread = (deviation[0, head] / 2**0.5).repeat(2)
        # Keys and queries are scaled by 1.2 each.
        logits = 1.44 * (drawn * spread) @ keys.T / 8**0.5
        expected = 8**0.5 * logits.exp().mean(0).log()
        assert torch.allclose(alone[head], expected, rtol=0.03, atol=0.01)


def test_scattered_heads_keep_more() -> None:
    """By hand: R 0.9 and 0.5 of two KV heads; 2 recent tokens, 10 to keep of 40 on average."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 2, 40, 8, generator=generator).double()
    size = torch.ones(1, 2, 4).double()
    mean = torch.tensor([0.9, 0.5])[None, :, None] * torch.ones(1, 2, 4).to(torch.complex128)
    rope = SimpleNamespace(
        pairs=lambda x: torch.complex(*x.chunk(2, dim=-1)),
        omega=torch.ones(4).double(),
        scale=torch.ones(4).double(),
    )
    at = torch.arange(40).expand(1, 2, 40).clone()
    at[0, 1, :20] = -1
    some = Candidates(keys, keys, at, 40, 10, rope, Stats(mean, size))  # type: ignore[arg-type]
    ranking = ByConcentration(10, 4, recent=2).rank(some)
    # 8 x (0.2 + 0.8 x 0.1 / 0.3) = 3.73 and 8 x (0.2 + 0.8 x 0.5 / 0.3) = 12.27, and 2 recent.
    assert ranking.counts is not None
    assert ranking.counts.tolist() == [[6, 14]]
    kept = select(ranking, 10).index
    assert (kept[0, 0] >= 0).sum() == 6
    assert (at[0, 1, kept[0, 1]] >= 20).all()
    assert {38, 39} <= set(kept[0, 0].tolist()) & set(kept[0, 1].tolist())
