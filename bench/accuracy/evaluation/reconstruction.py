"""Are mean logits by distance those that the statistics predict? Pearson's r of every head."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.table import table
from sglang_tri.statistics import describe, files, model_rope, validate
from sglang_tri.statistics.statistics import Statistics

from .plan import hardest
from .runner import Subject

INSTANCES = 5
"""Of each task at its hardest depth in range."""


def correlations(model: Path, statistics: Statistics) -> torch.Tensor:
    """Mean r over held-out instances of all tasks: float32 [layers, query heads]."""
    rope = model_rope.of_model(str(model), statistics.interleaved)
    sequences = [prompt + output for prompt, output in hardest(model, INSTANCES)]
    found = validate.on_tokens(statistics, str(model), rope, sequences)
    return torch.stack([validation.r for validation in found]).mean(0)


def reconstruction_table(subject: Subject) -> str:
    """One row a layer: r of each head, and the layer's three readings of R."""
    statistics = files.load(subject.stats)
    r, concentration = correlations(subject.model, statistics), describe.concentration(statistics)
    readings = (concentration.strongest, concentration.amplitude, concentration.energy)
    heads = [f"r, head {head}" for head in range(r.shape[1])]
    rows = [["layer", *heads, "R strongest", "R amplitude", "R energy"]]
    for layer, own in enumerate(r.tolist()):
        means = [reading[layer].mean().item() for reading in readings]
        rows.append([str(layer), *(f"{value:.2f}" for value in (*own, *means))])
    return table(rows)
