"""Make a round's tensors from what the host knows, without asking the device anything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from sglang_tri.kernels.moves import Budgets
from sglang_tri.kernels.pages import Pages
from sglang_tri.rounds import Due, Round


def plan(
    due: list[Due], logical: Sequence[int], request_to_slot: torch.Tensor, page_size: int
) -> tuple[Round, list[torch.Tensor]]:
    """A round of requests with equal settings, whose regions have counted it already.

    Args:
        due: the requests.
        logical: their logical lengths before the round.
        request_to_slot: int32 [rows, length]; read now, because rows are overwritten before the
            round runs.
        page_size: slots per page.

    Returns:
        The round, and for each request its slots that become free, int32: whole pages, each page's
        slots together and in order.
    """
    device = request_to_slot.device
    slots = [
        request_to_slot[one.row, one.region.start : one.region.start + one.candidates]
        for one in due
    ]
    freed = [row[one.region.kept :] for row, one in zip(slots, due, strict=True)]
    whole = torch.cat(slots)
    rows, lengths, deltas = upload(
        [[one.row for one in due], logical, [one.region.delta for one in due]],
        torch.int64,
        device,
    )
    settings, count = due[0].state.settings, len(due)
    ends = list(accumulate((one.candidates // page_size for one in due), initial=0))
    each = [page_size, 0, due[0].region.kept, settings.recent]
    packed = upload([*ends, *(n for n in each for _ in due)], torch.int32, device)
    last_page_len, skipped, kept, recent = packed[count + 1 :].view(4, count)
    pages = Pages(
        packed[: count + 1],
        whole if page_size == 1 else whole[::page_size] // page_size,
        last_page_len,
        skipped,
        page_size,
        max(one.candidates for one in due),
    )
    budgets = Budgets(kept, recent, due[0].region.kept)
    return Round(settings, due, pages, budgets, lengths, rows, deltas), freed


def upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
