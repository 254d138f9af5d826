"""Are mean logits by distance those that the statistics predict? Pearson's r of every head."""

from __future__ import annotations

import torch

from bench.reference_model.evaluate import instance
from bench.reference_model.tokenizer import output_ids, prompt_ids
from bench.table import table
from sglang_tri.stats import describe, files, model_rope, validate

from .plan import DEPTHS
from .runner import Subject

INSTANCES = 5
"""Of each task at its hardest depth in range."""


def correlations(subject: Subject) -> torch.Tensor:
    """Mean r over held-out instances of all tasks: float32 [layers, query heads]."""
    statistics = files.load(subject.stats)
    rope = model_rope.of_model(str(subject.model), statistics.interleaved)
    found = []
    for task, depths in DEPTHS.items():
        for number in range(INSTANCES):
            made = instance(task, depths[-1], number)
            ids = prompt_ids(made.question) + output_ids(made)
            found.append(validate.on_tokens(statistics, str(subject.model), rope, ids).r)
    return torch.stack(found).mean(0)


def reconstruction_table(subject: Subject) -> str:
    """One row a layer: r of each head, and the layer's three readings of R."""
    r, concentration = correlations(subject), describe.concentration(files.load(subject.stats))
    readings = (concentration.strongest, concentration.amplitude, concentration.energy)
    heads = [f"r, head {head}" for head in range(r.shape[1])]
    rows = [["layer", *heads, "R strongest", "R amplitude", "R energy"]]
    for layer, own in enumerate(r.tolist()):
        means = [reading[layer].mean().item() for reading in readings]
        rows.append([str(layer), *(f"{value:.2f}" for value in (*own, *means))])
    return table(rows)
