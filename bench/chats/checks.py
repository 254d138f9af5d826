"""What the demo must have shown."""

from __future__ import annotations

from bench.chats.turns import Outcome

CACHED = 0.6
"""Least share of the second turn's prompts: texts that come back in other tokens are not found."""


def problems(policy: Outcome, stock: Outcome, held: int, pool: int) -> list[str]:
    """What was to be seen and was not.

    Args:
        held: most generated tokens that a request may hold.
        pool: KV slots.
    """
    chats = len(policy.first)
    untouched = sum(answer.rounds == 0 for answer in policy.first)
    found = []
    if untouched:
        found.append(f"{untouched} of {chats} chats had nothing evicted")
    if policy.held > held:
        found.append(f"a request held {policy.held} generated tokens, more than {held}")
    if policy.compressed <= chats // 2:
        found.append(f"only {policy.compressed} of {chats} chats went on from compressed history")
    if policy.cached_share < CACHED:
        found.append(f"{policy.cached_share:.0%} of the second turn was cached, not {CACHED:.0%}")
    if policy.tokens_per_second <= stock.tokens_per_second:
        found.append("no more tokens/s than stock SGLang")
    for outcome in (policy, stock):
        if outcome.peak_slots > pool:
            found.append(f"{outcome.name} had {outcome.peak_slots} slots in use, of {pool}")
    return found
