"""How much of a task full attention solves, in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .batches import SEED_BITS, Batch, pad
from .tasks import Example, example
from .tokenizer import chat_ids
from .train import TRAINING, judge

HELD_OUT = 1 << SEED_BITS
"""Instances from this seed on are for evaluation: none of them was trained on."""
APART = 1 << 20
"""Held-out instances from this number on are for `deepest_solved`."""
ENOUGH = 0.95
"""Share that full attention has to solve of a depth that is in range."""
MARGIN = 0.02
"""More than ENOUGH by so much, and a depth is chosen: other instances shall show ENOUGH, too."""
_TOKENS = 8192


def depths_of(folder: Path) -> dict[str, list[int]]:
    """Depths at which a published model is measured, by task.

    Three in range, easy to hardest, and one deeper than any that was trained.
    """
    content = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    depths: dict[str, list[int]] = content["depths"]
    return depths


def instance(task: str, depth: int, number: int) -> Example:
    """Held-out instance `number`."""
    return example(task, depth, HELD_OUT + number)


@torch.inference_mode()
def accuracy(model: Any, task: str, depth: int, instances: int, first: int = 0) -> float:
    """Share of held-out instances, from number `first` on, whose every token is most probable."""
    solved = 0.0
    for batch in held_out(task, depth, range(first, first + instances)):
        solved += judge(model, batch).chains * len(batch.inputs)
    return round(solved) / instances


def held_out(task: str, depth: int, numbers: Sequence[int]) -> Iterator[Batch]:
    """Instances in batches."""
    rows: list[list[Example]] = []
    for number in numbers:
        rows.append([instance(task, depth, number)])
        size = sum(len(chat_ids(row)[0]) for row in rows)
        if size > _TOKENS or number == numbers[-1]:
            yield pad(rows)
            rows = []


def deepest_solved(model: Any, task: str, trained: int, instances: int) -> int:
    """The deepest of some depths up to `trained` that is solved, with MARGIN; else half of it.

    By instances that no other figure is of.
    """
    steps = sorted({max(1, trained * part // 20) for part in range(10, 21)}, reverse=True)
    enough = ENOUGH + MARGIN
    solved = (d for d in steps if accuracy(model, task, d, instances, APART) >= enough)
    return next(solved, steps[-1])
