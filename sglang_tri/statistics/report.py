"""Statistics as text and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import describe
from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics

# Distances that the preferred one is looked for in.
LONGEST = 16384
_HEADINGS = ("R3", "R amp.", "R energy", "R full")
_EXPLANATION = (
    "R is |E q| / E|q| of queries before RoPE. R3: mean over each head's three frequency pairs",
    "with the largest |E q_f|. R amp., R energy: over all pairs, weighted by E|q_f| and by its",
    "square. R full: of whole heads.",
)


def summary(statistics: Statistics) -> dict[str, Any]:
    """Means over all heads, and the share of heads whose R3 is above 0.95."""
    found = describe.concentration(statistics)
    return {
        "r3": float(found.strongest.mean()),
        "r3_above_0.95": float((found.strongest > describe.CONCENTRATED).float().mean()),
        "r_amplitude": float(found.amplitude.mean()),
        "r_energy": float(found.energy.mean()),
        "r_full": None if found.full is None else float(found.full.mean()),
    }


def to_dict(statistics: Statistics, rope: Rope | None) -> dict[str, Any]:
    """Everything that `show` prints, for other programs."""
    found = describe.concentration(statistics)
    readings = {
        "r3": found.strongest,
        "r_amplitude": found.amplitude,
        "r_energy": found.energy,
        "r_full": found.full,
        "strongest_pairs": describe.strongest_pairs(statistics),
        "preferred_distance": _preferred(statistics, rope),
    }
    heads = {name: None if t is None else t.tolist() for name, t in readings.items()}
    return {"metadata": statistics.metadata, "summary": summary(statistics), "heads": heads}


def show(statistics: Statistics, rope: Rope | None, heads: bool) -> str:
    """A table with a row per layer, or per head."""
    layers, count, size = statistics.shape
    lines = [f"{statistics.path}: {layers} layers, {count} query heads, head size {size}"]
    lines += [f"  {name}: {value}" for name, value in sorted(statistics.metadata.items())]
    lines += ["", *_EXPLANATION, *_legend(statistics, rope), ""]
    lines += [*_rows(statistics, rope, heads), "", _overall(summary(statistics))]
    return "\n".join(lines)


def diff(first: Statistics, second: Statistics) -> str:
    """How much two files of one model differ, by layer.

    Raises:
        KvPolicyError: their shapes differ.
    """
    if first.shape != second.shape:
        raise KvPolicyError(
            f"{first.path} has (layers, query heads, head size) {first.shape}, {second.path} has "
            f"{second.shape}: only statistics of one model can be compared."
        )
    inner = (first.q_mean * second.q_mean.conj()).real.sum(-1)
    cosine = inner / (_length(first.q_mean) * _length(second.q_mean))
    centre = _length(first.q_mean - second.q_mean) / _length(first.q_mean)
    size = _length(first.q_abs - second.q_abs) / _length(first.q_abs)
    r3 = describe.concentration(second).strongest - describe.concentration(first).strongest
    lines = [
        "By layer: least cosine of the two E q among heads, largest relative difference of E q and",
        "of E|q|, and of the second file's R3 from the first's.",
        "",
        f"{'layer':>5} {'cosine':>10} {'E q':>10} {'E|q|':>10} {'R3':>10}",
    ]
    for layer in range(first.shape[0]):
        worst = r3[layer][r3[layer].abs().argmax()]
        values = (cosine[layer].min(), centre[layer].max(), size[layer].max(), worst)
        lines.append(f"{layer:>5} " + " ".join(f"{float(v):>10.3g}" for v in values))
    return "\n".join([*lines, "", _overall(summary(first)), _overall(summary(second))])


def _length(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)


def _overall(values: dict[str, Any]) -> str:
    full = "" if values["r_full"] is None else f", R full {values['r_full']:.3f}"
    return (
        f"all heads: R3 {values['r3']:.3f}, {values['r3_above_0.95']:.1%} of heads above 0.95; "
        f"R amp. {values['r_amplitude']:.3f}, R energy {values['r_energy']:.3f}{full}"
    )


def _legend(statistics: Statistics, rope: Rope | None) -> Iterator[str]:
    yield "strongest: those frequency pairs" + ("." if rope is None else ", as tokens per turn.")
    if rope is None:
        yield "Give --model-path or --rope-theta for wavelengths and preferred distances."
        return
    yield f"distance: where the head's distance curve is highest in 1..{LONGEST}."
    if statistics.k_mean is None:
        yield "(This file has no mean keys: each of their components counts as 1.)"


def _preferred(statistics: Statistics, rope: Rope | None) -> torch.Tensor | None:
    return None if rope is None else describe.preferred_distances(statistics, rope, LONGEST)


def _rows(statistics: Statistics, rope: Rope | None, by_head: bool) -> Iterator[str]:
    found, preferred = describe.concentration(statistics), _preferred(statistics, rope)
    pairs = describe.strongest_pairs(statistics)
    sixth, last = ("head", "distance") if by_head else ("R3>0.95", "distance of each head")
    columns = ("layer", *_HEADINGS, sixth, "strongest", last)
    yield _row(columns if preferred is not None else columns[:-1])
    layers, count, _ = statistics.shape
    heads: list[int | None] = [*range(count)] if by_head else [None]
    for layer, head in product(range(layers), heads):
        if head is None:
            above = (found.strongest[layer] > describe.CONCENTRATED).float().mean()
            label = f"{float(above):.1%}"
            strongest = pairs[layer].flatten().bincount().topk(describe.STRONGEST).indices
        else:
            label, strongest = str(head), pairs[layer, head]
        cells = [str(layer), *_readings(found, layer, head), label, _pair_names(strongest, rope)]
        if preferred is not None:
            chosen = preferred[layer] if head is None else preferred[layer, head : head + 1]
            cells.append(" ".join(map(str, chosen.tolist())))
        yield _row(cells)


def _readings(found: describe.Concentration, layer: int, head: int | None) -> list[str]:
    chosen = slice(None) if head is None else head
    readings = (found.strongest, found.amplitude, found.energy, found.full)
    return ["-" if r is None else f"{float(r[layer, chosen].mean()):.3f}" for r in readings]


def _pair_names(pairs: torch.Tensor, rope: Rope | None) -> str:
    if rope is None:
        return " ".join(map(str, pairs.tolist()))
    turns = describe.wavelengths(rope)[pairs].tolist()
    return " ".join(f"{pair}({turn:.0f})" for pair, turn in zip(pairs.tolist(), turns, strict=True))


def _row(cells: tuple[str, ...] | list[str]) -> str:
    first, second = cells[:6], cells[6:]
    return (
        " ".join(f"{c:>8}" for c in first) + "  " + "  ".join(f"{c:<30}" for c in second).rstrip()
    )
