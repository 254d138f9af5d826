"""How much of a task full attention solves, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .batches import SEED_BITS, Batch, pad
from .tasks import Example, example
from .tokenizer import chat_ids
from .train import judge

HELD_OUT = 1 << SEED_BITS
"""Instances from this seed on are for evaluation: none of them was trained on."""
IN_RANGE = {"tree": 14, "registers": 40, "variables": 45}
"""Depths up to which the model that ships solves 95% or more; it was trained somewhat deeper."""
_TOKENS = 8192


def instance(task: str, depth: int, number: int) -> Example:
    """Held-out instance `number`."""
    return example(task, depth, HELD_OUT + number)


@torch.inference_mode()
def accuracy(model: Any, task: str, depth: int, instances: int) -> float:
    """Share of held-out instances whose every output token is the most probable."""
    solved = 0.0
    for batch in held_out(task, depth, instances):
        solved += judge(model, batch).chains * len(batch.inputs)
    return round(solved) / instances


def held_out(task: str, depth: int, instances: int) -> Iterator[Batch]:
    """Instances 0, 1, ... in batches."""
    rows: list[list[Example]] = []
    for number in range(instances):
        rows.append([instance(task, depth, number)])
        size = sum(len(chat_ids(row)[0]) for row in rows)
        if size > _TOKENS or number == instances - 1:
            yield pad(rows)
            rows = []
