"""What was measured: a table, the gain in a line, and what one chat wrote."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from statistics import median

from bench.chats.turns import Outcome
from bench.table import table

EXCERPT = 400
"""Characters of an answer's end: its beginning was written before anything was evicted."""


def measured(policy: Outcome, stock: Outcome) -> str:
    """One row for each figure, one column for each server."""
    whole = max(answer.prompt + answer.generated for answer in policy.first)
    rows: list[tuple[str, Callable[[Outcome], str]]] = [
        ("First turn: requests at once, mean", lambda o: f"{o.running:.1f}"),
        ("  generated tokens/s", lambda o: f"{o.tokens_per_second:.1f}"),
        ("  seconds until all had finished", lambda o: f"{o.seconds:.0f}"),
        (f"  KV slots of a chat of {whole} tokens", lambda o: f"{_slots(o):,}"),
        ("Second turn: prompt tokens", lambda o: f"{_sum(o, 'prompt'):,}"),
        ("  of them cached", lambda o: f"{_sum(o, 'cached'):,} ({o.cached_share:.0%})"),
        ("  first token after, median", lambda o: f"{_wait(o):.1f} s"),
        ("Both: peak KV slots", lambda o: f"{o.peak_slots:,}"),
        ("  requests retracted", lambda o: str(o.retracted)),
    ]
    header = ["", policy.name, stock.name]
    return table([header, *([name, of(policy), of(stock)] for name, of in rows)])


def gain(policy: Outcome, stock: Outcome, pool: int) -> str:
    """One line."""
    faster = policy.tokens_per_second / stock.tokens_per_second
    return (
        f"In the same {pool:,} KV slots: {faster:.1f} times the tokens/s; in the second turn the "
        f"first token after {_wait(policy):.1f} s instead of {_wait(stock):.1f} s."
    )


def excerpts(question: str, policy: Outcome, stock: Outcome, chat: int, held: int) -> str:
    """How the same answer ends on both servers.

    Args:
        question: of this chat.
        chat: its number, from 0.
        held: most generated tokens that the policy keeps.
    """
    length = policy.first[chat].generated
    return "\n".join(
        [
            f"Asked: {question}",
            f"{policy.name}, which keeps at most {held} of the {length} tokens it writes, ends:",
            _indented(policy.first[chat].text[-EXCERPT:]),
            f"{stock.name}, which keeps all, ends:",
            _indented(stock.first[chat].text[-EXCERPT:]),
        ]
    )


def _indented(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(
        textwrap.fill(line, 96, initial_indent="  | ", subsequent_indent="  | ") for line in lines
    )


def _slots(outcome: Outcome) -> int:
    return max(answer.slots for answer in outcome.first)


def _sum(outcome: Outcome, count: str) -> int:
    return sum(getattr(answer, count) for answer in outcome.second)


def _wait(outcome: Outcome) -> float:
    return median(answer.first_token_s for answer in outcome.second)
