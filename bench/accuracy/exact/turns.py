"""A second turn goes on from the compressed first one, and is as exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.accuracy.client import Answer, Ask, Recorded, send_all
from bench.goal import Goal
from bench.server import Endpoint

from .judge import Judge, Verdict
from .outputs import figures, goals
from .parts import Result, need
from .questions import Questions

FIRST, SECOND = 150, 200
# Behind those of other parts, which must not be found cached; one greedy, one sampled.
NUMBERS = (20, 21)


def check(
    server: Endpoint, trace: Path, judge: Judge, questions: Questions, page_size: int
) -> Result:
    """Two conversations at once; see `outputs.check`."""
    asks = [Ask(questions(number), FIRST, temperature=float(number % 2)) for number in NUMBERS]
    firsts = send_all(server, asks)
    question = questions(max(NUMBERS) + 1, further=True)
    further = [
        Ask([*first.tokens, *question], SECOND, temperature=first.ask.temperature)
        for first in firsts
    ]
    seconds = send_all(server, further)
    verdicts: list[Verdict] = []
    for pair in zip(firsts, seconds, strict=True):
        talk = judge.conversation(pair[0], page_size)
        verdicts += [judge.verdict(talk, one, Recorded.read(trace, one.rid)) for one in pair]
    found = {
        **figures(verdicts),
        "cached_tokens": [second.meta["cached_tokens"] for second in seconds],
        "tokens_before": [len(first.tokens) for first in firsts],
    }
    return Result([*reuse(firsts, seconds, page_size), *goals(verdicts, judge.limits)], found)


def reuse(firsts: Sequence[Answer], seconds: Sequence[Answer], page_size: int) -> list[Goal]:
    """All but the last, unfinished page is there, and compressed."""
    history = [second.meta["kv_policy"]["history"] for second in seconds]
    missing = [
        len(first.tokens) - second.meta["cached_tokens"]
        for first, second in zip(firsts, seconds, strict=True)
    ]
    once = "no more than a page of the first turn is prefilled again"
    return [
        need("second turns find compressed history", history, set(history) == {"compressed"}),
        need(once, f"{missing} tokens", max(missing) <= page_size),
    ]
