"""With a budget that no output reaches, a server gives stock SGLang's very bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.accuracy.client import Answer, Ask, send
from bench.server import Endpoint

from .parts import Result, need
from .questions import Questions

TOKENS = 120


def check(stock: Endpoint, huge: Endpoint, questions: Questions) -> Result:
    """The same requests to both, one after the other."""
    return compare(*(_talk(server, questions) for server in (stock, huge)))


def _talk(server: Endpoint, questions: Questions) -> list[Answer]:
    """Two questions, greedy, and a second turn behind the first of them."""
    first, other = (send(server, Ask(questions(number), TOKENS)) for number in range(2))
    second = send(server, Ask([*first.tokens, *questions(2, further=True)], TOKENS))
    return [first, other, second]


def compare(stock: Sequence[Answer], huge: Sequence[Answer]) -> Result:
    pairs = list(zip(stock, huge, strict=True))
    ids = [one.ids == two.ids for one, two in pairs]
    same = [np.array_equal(one.logprobs, two.logprobs) for one, two in pairs]
    cached = [[answer.meta["cached_tokens"] for answer in pair] for pair in pairs]
    of = f"of {len(pairs)} requests"
    goals = [
        need("output ids are stock SGLang's", f"{sum(ids)} {of}", all(ids)),
        need("so are all log-probabilities, bit for bit", f"{sum(same)} {of}", all(same)),
        need("as many tokens are cached", cached, all(one == two for one, two in cached)),
    ]
    differing = [_first_other(*pair) for pair in pairs]
    return Result(goals, {"requests": len(pairs), "first_other_token": differing})


def _first_other(one: Answer, two: Answer) -> int | None:
    """Index of the first token whose id or log-probability differs."""
    same = zip(one.ids, one.logprobs, two.ids, two.logprobs, strict=False)
    return next((n for n, (a, p, b, q) in enumerate(same) if a != b or p != q), None)
