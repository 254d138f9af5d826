"""Plan rounds on the scheduler's thread, without asking the device anything.

Which slots become free depends on lengths only, so a plan needs no result from the device: the
survivors are packed into the first slots of the private region and its tail is free at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages

if TYPE_CHECKING:
    from sglang_tri.config import KvPolicyConfig
    from sglang_tri.request.region import Region
    from sglang_tri.request.request import Request


@dataclass(slots=True)
class DueRequest:
    """One request of a round, with what it is before the round.

    Attributes:
        request: its state.
        row: its row of the request-to-slot table.
        region: what is evicted from.
        physical: its physical length.
        logical: its logical length.
        candidates: slots of the private region.
        seen: of these the first ones that were candidates before.
    """

    request: Request
    row: int
    region: Region = field(init=False)
    physical: int = field(init=False)
    logical: int = field(init=False)
    candidates: int = field(init=False)
    seen: int = field(init=False)

    def __post_init__(self) -> None:
        self.region = self.request.regions[-1]
        self.physical = self.region.due_at
        self.logical = self.physical + self.region.delta
        self.candidates = self.physical - self.region.start
        self.seen = self.region.kept if self.region.evicted else 0

    @property
    def freed(self) -> int:
        """Slots that the round frees."""
        return self.candidates - self.region.kept

    @property
    def remaining(self) -> int:
        """Its physical length behind the round."""
        return self.region.start + self.region.kept


@dataclass(slots=True)
class Round:
    """A planned round of all due requests with equal settings.

    Attributes:
        settings: what they have in common.
        requests: the requests.
        pages: their candidates, in slot order.
        budgets: how many each of them keeps.
        slots: int32 [candidates of all requests], the slots of `pages`.
        logical: int64 [requests], logical lengths.
        rows: int64 [requests], rows of the request-to-slot table.
        deltas: int64 [requests], logical minus physical length after the round.
    """

    settings: KvPolicyConfig
    requests: list[DueRequest]
    pages: Pages
    budgets: Budgets
    slots: torch.Tensor
    logical: torch.Tensor
    rows: torch.Tensor
    deltas: torch.Tensor


def plan(
    requests: Sequence[DueRequest], request_to_slot: torch.Tensor, page_size: int
) -> tuple[list[Round], torch.Tensor]:
    """One round for each of `requests`, whose regions count it.

    Args:
        requests: those with a full private region.
        request_to_slot: int32 [rows, length]; read now, because rows are overwritten before the
            round runs.
        page_size: slots per page.

    Returns:
        Rounds of requests with equal settings, and the slots that are free from now on, int64
        [freed]: whole pages, each page's slots together and in order.
    """
    groups: dict[KvPolicyConfig, list[DueRequest]] = {}
    for due in requests:
        groups.setdefault(due.request.settings, []).append(due)
        due.request.evicted()
    rounds, freed = [], []
    for group in groups.values():
        slots = [
            request_to_slot[due.row, due.region.start : due.region.start + due.candidates]
            for due in group
        ]
        freed += [row[due.region.kept :] for row, due in zip(slots, group, strict=True)]
        rounds.append(_plan_alike(group, torch.cat(slots), page_size))
    return rounds, torch.cat(freed).long()


def _plan_alike(requests: list[DueRequest], slots: torch.Tensor, page_size: int) -> Round:
    """A round of requests with equal settings, whose candidates are `slots`, int32."""
    settings, kept = requests[0].request.settings, requests[0].region.kept
    numbers = [(due.row, due.logical, due.region.delta) for due in requests]
    rows, logical, deltas = upload([*zip(*numbers, strict=True)], torch.int64, slots.device)
    ends = list(accumulate((due.candidates // page_size for due in requests), initial=0))
    each = [page_size, 0, kept, settings.recent]
    packed = upload([*ends, *(n for n in each for _ in requests)], torch.int32, slots.device)
    last_page_len, skipped, budget, recent = packed[len(ends) :].view(4, -1)
    pages = Pages(
        packed[: len(ends)],
        slots if page_size == 1 else slots[::page_size] // page_size,
        last_page_len,
        skipped,
        page_size,
        max(due.candidates for due in requests),
    )
    budgets = Budgets(budget, recent, kept)
    return Round(settings, requests, pages, budgets, slots, logical, rows, deltas)


def upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
