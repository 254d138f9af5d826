"""Training batches: the tasks at depths that grow as the model learns them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from .tasks import TASKS, example
from .tokenizer import PAD, output_ids, prompt_ids

IGNORED = -100
ROWS = 4
SEED_BITS = 40
"""Of the instances that are trained on; those for evaluation have larger seeds."""
FIRST = {"tree": 1, "registers": 1, "variables": 2}
"""Depths to begin with: chains of a few dozen tokens."""
LAST = {"tree": 20, "registers": 64, "variables": 90}
"""The deepest that is trained: chains of about 700 tokens."""
LEARNED = 0.8
"""Share of right chains at which deeper ones are taken in."""


@dataclass
class Curriculum:
    """The deepest that is trained by now, for each task."""

    depths: dict[str, int] = field(default_factory=lambda: dict(FIRST))
    solved: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 0.0))
    """Running share of right chains among the deepest examples."""

    def draw(self, task: str, rng: random.Random) -> int:
        """A depth for a batch: every other time one of the deepest fifth."""
        deepest = self.depths[task]
        low = max(FIRST[task], deepest - deepest // 5) if rng.random() < 0.5 else FIRST[task]
        return rng.randint(low, deepest)

    def report(self, task: str, depth: int, solved: float) -> None:
        """Take in the share of right chains in a batch."""
        deepest = self.depths[task]
        if depth < deepest - deepest // 5:
            return
        self.solved[task] += 0.1 * (solved - self.solved[task])
        if self.solved[task] >= LEARNED and deepest < LAST[task]:
            self.depths[task] = min(LAST[task], deepest + max(1, deepest // 8))
            self.solved[task] -= 0.2

    @property
    def complete(self) -> bool:
        return self.depths == LAST


@dataclass(frozen=True)
class Batch:
    """Examples of one task and depth, one a row, padded at the end."""

    inputs: torch.Tensor
    """int64 [rows, tokens]."""
    targets: torch.Tensor
    """The next tokens, IGNORED in the question and behind the end: int64 [rows, tokens]."""


def make_batch(task: str, depth: int, rng: random.Random, tokens: int) -> Batch:
    """As many examples of a task as `tokens` hold, at least ROWS."""
    rows: list[tuple[list[int], list[int]]] = []
    longest = 0
    while True:
        drawn = example(task, depth, rng.getrandbits(SEED_BITS))
        prompt, output = prompt_ids(drawn.question), output_ids(drawn)
        longest = max(longest, len(prompt) + len(output))
        if len(rows) >= ROWS and longest * (len(rows) + 1) > tokens:
            return pad(rows)
        rows.append((prompt, output))


def pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """A batch of prompts with their outputs."""
    width = max(len(prompt) + len(output) for prompt, output in rows) - 1
    inputs = torch.full((len(rows), width), PAD)
    targets = torch.full((len(rows), width), IGNORED)
    for row, (prompt, output) in enumerate(rows):
        ids = torch.tensor(prompt + output)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return Batch(inputs, targets)
