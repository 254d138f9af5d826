"""How many KV slots a request's generation needs. Lengths only."""

from __future__ import annotations

from sglang_tri.config import KvPolicyConfig
from sglang_tri.rounds import RequestState, ceil_to


def slots_for(settings: KvPolicyConfig, tokens: int, page_size: int, regions: int = 1) -> int:
    """Slots that hold the next `tokens` output tokens of a request at any time, in whole pages.

    Args:
        settings: of the request.
        tokens: output tokens.
        page_size: slots per page.
        regions: private regions with a budget of their own: two where the end of thinking closes
            the first.
    """
    region = ceil_to(settings.budget, page_size) + ceil_to(settings.interval, page_size)
    return min(ceil_to(tokens, page_size), regions * region)


def more_slots(state: RequestState, physical: int, tokens: int, page_size: int) -> int:
    """Slots that a running request with `physical` slots takes on top at the most.

    Args:
        tokens: output tokens that are still to come, at the most.
    """
    if not state.regions:
        return slots_for(state.settings, tokens, page_size)
    room = max(0, state.regions[-1].limit - physical)
    return min(ceil_to(tokens, page_size), room)
