"""A second turn goes on from the compressed first one, and is as exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.goal import Goal
from bench.server import Endpoint

from .client import Answer, Ask, send_all
from .judge import Judge, Recorded, Verdict
from .outputs import Limits, figures, goals
from .questions import Questions
from .results import Result, need

FIRST, SECOND = 150, 200
TALKS = 2
# The questions before are those of other parts, which must not be found cached.
FIRST_QUESTION = 20


def check(
    server: Endpoint,
    trace: Path,
    judge: Judge,
    questions: Questions,
    page_size: int,
    limits: Limits,
) -> Result:
    """Two conversations at once, one greedy, one sampled; see `outputs.check`."""
    numbers = range(FIRST_QUESTION, FIRST_QUESTION + TALKS)
    firsts = send_all(server, [Ask(questions(n), FIRST, float(n % 2)) for n in numbers])
    seconds = send_all(server, [_go_on(first, questions) for first in firsts])
    verdicts: list[Verdict] = []
    for pair in zip(firsts, seconds, strict=True):
        talk = judge.conversation(None, page_size)
        verdicts += [judge.verdict(talk, one, Recorded.read(trace, one.rid)) for one in pair]
    return Result(
        [*reuse(firsts, seconds, page_size), *goals(verdicts, limits)],
        {
            **figures(verdicts),
            "cached_tokens": [second.meta["cached_tokens"] for second in seconds],
            "tokens_before": [len(first.tokens) for first in firsts],
        },
    )


def _go_on(first: Answer, questions: Questions) -> Ask:
    question = questions(FIRST_QUESTION + TALKS, further=True)
    return Ask([*first.tokens, *question], SECOND, first.ask.temperature)


def reuse(firsts: Sequence[Answer], seconds: Sequence[Answer], page_size: int) -> list[Goal]:
    """All but the last, unfinished page is there, and compressed."""
    history = [second.meta["kv_policy"]["history"] for second in seconds]
    missing = [
        len(first.tokens) - second.meta["cached_tokens"]
        for first, second in zip(firsts, seconds, strict=True)
    ]
    return [
        need(
            "second turns find compressed history",
            ", ".join(history),
            all(found == "compressed" for found in history),
        ),
        need(
            "no more than a page of the first turn is prefilled again",
            f"{missing} tokens",
            max(missing) <= page_size,
        ),
    ]
