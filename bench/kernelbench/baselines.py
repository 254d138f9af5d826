"""What the kernels are compared with: the same round in plain torch, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.kernelbench.geometry import Model
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import EPSILON

# Future offsets of the published score (arXiv 2604.04921).
OFFSETS = tuple(2**exponent for exponent in range(17))


@dataclass(frozen=True)
class Statistics:
    """Query statistics before RoPE, of random numbers.

    Attributes:
        centre: complex64 [layers, query_heads, pairs].
        magnitude: float32 [layers, query_heads, pairs].
        frequencies: float64 [pairs], radians per position.
    """

    centre: torch.Tensor
    magnitude: torch.Tensor
    frequencies: torch.Tensor

    @classmethod
    def random(cls, model: Model, device: torch.device) -> Statistics:
        pairs = model.head_dim // 2
        shape = model.layers, model.query_heads, pairs
        exponent = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
        return cls(
            torch.complex(torch.randn(shape, device=device), torch.randn(shape, device=device)),
            torch.rand(shape, device=device),
            model.theta**-exponent,
        )

    def queries(self) -> Queries:
        """The mean over offsets folded into one query for each head."""
        offsets = torch.tensor(OFFSETS, dtype=torch.float64, device=self.frequencies.device)
        phase = offsets[:, None] * self.frequencies
        centre = self.centre * torch.polar(torch.ones_like(phase), phase).mean(0)
        return Queries(
            torch.stack([centre.real, centre.imag], 2).float(),
            self.magnitude,
            self.frequencies,
            2 * len(self.frequencies),
            False,
        )


@dataclass(frozen=True)
class Batch:
    """Requests with equally many candidates.

    Attributes:
        keys, values: per layer [slots, kv_heads, head_dim].
        slots: int64 [requests, candidates].
        positions: int64 [requests], logical lengths; candidates are the last tokens before it.
        budget: candidates kept, the last `recent` among them.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    slots: torch.Tensor
    positions: torch.Tensor
    budget: int
    recent: int

    def dense(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both components of each pair, float32 [requests, candidates, kv_heads, pairs] each."""
        first, second = self.keys[layer][self.slots].float().chunk(2, -1)
        return first, second


# From a layer to scores, float32 [requests, kv_heads, group, candidates].
Scorer = Callable[[int], torch.Tensor]


def folded(batch: Batch, queries: Queries) -> Scorer:
    """Scores with the mean over offsets folded into the query."""
    rotated = queries.at(batch.positions)
    heads = batch.keys[0].shape[1]

    def scores(layer: int) -> torch.Tensor:
        first, second = batch.dense(layer)
        key = torch.cat([first, second], -1)
        query = rotated[layer].unflatten(1, (heads, -1))
        weight = queries.magnitude[layer].unflatten(0, (heads, -1))
        logit = torch.einsum("rnhd,rhgd->rhgn", key, query)
        return logit + torch.einsum("rnhf,hgf->rhgn", torch.hypot(first, second), weight)

    return scores


def per_offset(batch: Batch, statistics: Statistics) -> Scorer:
    """Scores with the cosine and sine of each pair, candidate and offset, as published."""
    candidates, heads = batch.slots.shape[1], batch.keys[0].shape[1]
    back = torch.arange(candidates, 0, -1, device=batch.slots.device)
    place = batch.positions[:, None] - back

    def turn(distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        phase = torch.remainder(distance[..., None] * statistics.frequencies, 2 * torch.pi)
        phase = phase.float()[:, :, None]
        return phase.cos(), phase.sin()

    def scores(layer: int) -> torch.Tensor:
        first, second = batch.dense(layer)
        cosine, sine = turn(place)
        real, imaginary = first * cosine + second * sine, second * cosine - first * sine
        centre = statistics.centre[layer].unflatten(0, (heads, -1))
        weight = statistics.magnitude[layer].unflatten(0, (heads, -1))
        modulus = torch.hypot(first, second)
        total = torch.einsum("rnhf,hgf->rhgn", modulus, weight)
        for offset in OFFSETS:
            cosine, sine = turn(batch.positions[:, None] - place + offset)
            ahead, across = real * cosine + imaginary * sine, imaginary * cosine - real * sine
            total += torch.einsum("rnhf,hgf->rhgn", ahead, centre.real) / len(OFFSETS)
            total += torch.einsum("rnhf,hgf->rhgn", across, centre.imag) / len(OFFSETS)
        return total

    return scores


def choose(batch: Batch, scores: Scorer) -> torch.Tensor:
    """int64 [requests, kv_heads, budget], ascending: the candidates that are kept."""
    candidates, layers = batch.slots.shape[1], len(batch.keys)
    total = torch.zeros((), device=batch.slots.device)
    for layer in range(layers):
        rows = scores(layer)
        deviation, mean = torch.std_mean(rows, -1, correction=0, keepdim=True)
        total = total + ((rows - mean) / (deviation + EPSILON)).amax(2) / layers
    front = candidates - batch.recent
    best = total[..., :front].topk(batch.budget - batch.recent, sorted=False).indices
    tail = torch.arange(front, candidates, device=best.device)
    return torch.cat([best.sort(-1).values, tail.expand(*best.shape[:-1], -1)], -1)


def write_back(batch: Batch, kept: torch.Tensor) -> None:
    """Gather the kept rows of each layer and write them, in order, into the first slots."""
    heads = torch.arange(kept.shape[1], device=kept.device)[:, None]
    source = batch.slots[:, None].expand(-1, kept.shape[1], -1).gather(-1, kept)
    target = batch.slots[:, None, : batch.budget]
    for layer in (*batch.keys, *batch.values):
        layer[target, heads] = layer[source, heads]


def round_in_torch(batch: Batch, scores: Scorer) -> None:
    """A whole round."""
    write_back(batch, choose(batch, scores))
