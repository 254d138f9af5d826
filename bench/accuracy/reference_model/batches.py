"""Training batches: the tasks at depths that grow as the model learns them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .tasks import TASKS, Example, chat, example
from .tokenizer import PAD, chat_ids

IGNORED = -100
LINE_END = ord("\n")
SEED_BITS = 40
"""Of the instances that are trained on; those for evaluation have larger seeds."""
FIRST = {"tree": 1, "registers": 1, "variables": 2}
"""Depths to begin with: chains of a few dozen tokens."""
LAST = {"tree": 17, "registers": 50, "variables": 70}
"""The deepest that is trained: chains of about 550 tokens."""
LEARNED = 0.99
"""Share of right tokens at which deeper ones are taken in."""
SPAN = 2048
"""Positions that gaps spread a row over: longer than the deepest examples."""


@dataclass
class Curriculum:
    """The deepest that is trained by now, for each task."""

    depths: dict[str, int] = field(default_factory=lambda: dict(FIRST))
    right: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 0.0))
    """Running share of right tokens among the deepest examples."""

    def draw(self, task: str, rng: random.Random) -> int:
        """A depth for a batch: every other time one of the deepest fifth."""
        deepest = self.depths[task]
        low = max(FIRST[task], deepest - deepest // 5) if rng.random() < 0.5 else FIRST[task]
        return rng.randint(low, deepest)

    def report(self, task: str, depth: int, right: float) -> None:
        """Take in the share of right tokens in a batch."""
        deepest = self.depths[task]
        if depth < deepest - deepest // 5:
            return
        self.right[task] += 0.1 * (right - self.right[task])
        if self.right[task] >= LEARNED and deepest < LAST[task]:
            self.depths[task] = min(LAST[task], deepest + max(1, deepest // 8))
            self.right[task] = 2 * LEARNED - 1


@dataclass(frozen=True)
class Batch:
    """Examples of one task and depth, one a row, padded at the end."""

    inputs: torch.Tensor
    """int64 [rows, tokens]."""
    targets: torch.Tensor
    """The next tokens, IGNORED in the question and behind the end: int64 [rows, tokens]."""
    positions: torch.Tensor
    """int64 [rows, tokens]."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(x.to(device) for x in (self.inputs, self.targets, self.positions)))

    def spread(self, rng: random.Random) -> Batch:
        """The same with gaps between the positions of some lines of the output.

        Distances as in the deepest examples are so learned from short ones (after Ruoss et al.,
        arXiv 2305.16843). The question stays together: which of its lines follows another is told
        by position alone.
        """
        steps = torch.ones_like(self.positions)
        for row, (ids, targets) in enumerate(zip(self.inputs.tolist(), self.targets, strict=True)):
            first = int((targets != IGNORED).int().argmax())
            begins = [at + 1 for at in range(first, len(ids) - 1) if ids[at] == LINE_END]
            room = rng.randint(0, max(0, SPAN - len(ids)))
            for at in rng.sample(begins, min(len(begins), rng.randint(1, 4))):
                gap = rng.randint(0, room)
                steps[row, at] += gap
                room -= gap
        return replace(self, positions=steps.cumsum(1) - 1)


def make_batch(
    task: str, depth: int, rng: random.Random, tokens: int, at_least: int = 1, chats: bool = False
) -> Batch:
    """As many examples of a task as `tokens` hold, at least so many rows.

    chats: in two turns, of `depth` together; of registers alone.
    """
    rows: list[list[Example]] = []
    longest = 0
    while True:
        seed = rng.getrandbits(SEED_BITS)
        first = rng.randrange(1, depth) if chats else depth
        drawn = chat([first, depth - first], seed) if chats else [example(task, depth, seed)]
        longest = max(longest, len(chat_ids(drawn)[0]))
        if len(rows) >= at_least and longest * (len(rows) + 1) > tokens:
            return pad(rows)
        rows.append(drawn)


def pad(rows: Sequence[Sequence[Example]]) -> Batch:
    """A batch of chats of one question or more."""
    made = [chat_ids(turns) for turns in rows]
    width = max(len(ids) for ids, _ in made) - 1
    inputs = torch.full((len(rows), width), PAD)
    targets = torch.full((len(rows), width), IGNORED)
    for row, (ids, written) in enumerate(made):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        wanted = torch.tensor(ids[1:]).masked_fill(~torch.tensor(written[1:]), IGNORED)
        targets[row, : len(ids) - 1] = wanted
    return Batch(inputs, targets, torch.arange(width).expand(len(rows), width))
