"""When a request is due for a round, and what a round is. Lengths only, no device work.

Words: *logical* lengths count tokens, *physical* lengths count KV slots. A request's slots are its
prompt region [0, start), which is never touched, and its private region [start, physical).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tri.config import KvPolicyConfig


def ceil_to(length: int, page_size: int) -> int:
    """`length` rounded up to whole pages."""
    return -(-length // page_size) * page_size


@dataclass(slots=True)
class Region:
    """The private region of one request, from a prefill to the release of its slots.

    Attributes:
        prompt: tokens that the prefill wrote, in slots [0, prompt).
        start: first slot that may be evicted; `prompt` rounded up to whole pages, because the
            prompt's last page belongs to the prompt.
        kept: slots that survive a round.
        due_at: physical length at which a round is due.
        delta: logical minus physical length.
        positions: logical positions by slot, kept only while a trace is written.
    """

    prompt: int
    start: int
    kept: int
    due_at: int
    delta: int = 0
    positions: torch.Tensor | None = None

    @classmethod
    def open(cls, settings: KvPolicyConfig, prompt: int, page_size: int) -> Region:
        start = ceil_to(prompt, page_size)
        kept = ceil_to(settings.budget, page_size)
        return cls(prompt, start, kept, start + kept + ceil_to(settings.interval, page_size))

    @property
    def candidates(self) -> int:
        """Slots of the private region when a round is due."""
        return self.due_at - self.start


@dataclass(slots=True)
class RequestState:
    """What the policy knows of one request; survives retraction, its region does not."""

    rid: str
    settings: KvPolicyConfig
    rounds: int = 0
    evicted_tokens: int = 0
    region: Region | None = None


@dataclass(slots=True)
class Due:
    """One request of a round: its state and its row of the request-to-slot table."""

    state: RequestState
    region: Region
    row: int


@dataclass(slots=True)
class Round:
    """A planned round of all due requests with equal settings.

    Attributes:
        settings: what they have in common.
        due: the requests.
        slots: int64 [requests, candidates], in slot order.
        logical: int64 [requests], logical lengths.
        rows: int64 [requests], rows of the request-to-slot table.
        deltas: int64 [requests], logical minus physical length after the round.
    """

    settings: KvPolicyConfig
    due: list[Due]
    slots: torch.Tensor
    logical: torch.Tensor
    rows: torch.Tensor
    deltas: torch.Tensor

    @property
    def kept(self) -> int:
        return self.due[0].region.kept

    @property
    def candidates(self) -> int:
        return self.slots.shape[1]


@dataclass(slots=True)
class Counters:
    """Totals of one server since its start."""

    rounds: int = 0
    evicted_tokens: int = 0
    freed_slots: int = 0
    requests_evicted: int = 0
    resident_generated_max: int = 0

    def saw_resident(self, slots: int) -> None:
        self.resident_generated_max = max(self.resident_generated_max, slots)
