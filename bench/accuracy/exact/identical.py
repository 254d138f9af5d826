"""With a budget that no output reaches, a server gives stock SGLang's very bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.server import Endpoint

from .client import Answer, Ask, send
from .questions import Questions
from .results import Result, need

TOKENS = 120


def check(stock: Endpoint, huge: Endpoint, questions: Questions) -> Result:
    """The same requests to both, one after the other."""
    return compare(*(_talk(server, questions) for server in (stock, huge)))


def _talk(server: Endpoint, questions: Questions) -> list[Answer]:
    """Two questions, greedy, and a second turn behind the first of them."""
    first = send(server, Ask(questions(0), TOKENS))
    other = send(server, Ask(questions(1), TOKENS))
    second = send(server, Ask([*first.tokens, *questions(2, further=True)], TOKENS))
    return [first, other, second]


def compare(stock: Sequence[Answer], huge: Sequence[Answer]) -> Result:
    pairs = list(zip(stock, huge, strict=True))
    ids = [one.ids == two.ids for one, two in pairs]
    logprobs = [np.array_equal(one.logprobs, two.logprobs) for one, two in pairs]
    cached = [[answer.meta["cached_tokens"] for answer in pair] for pair in pairs]
    of = f"of {len(pairs)} requests"
    return Result(
        [
            need("output ids are stock SGLang's", f"{sum(ids)} {of}", all(ids)),
            need(
                "so are all log-probabilities, bit for bit", f"{sum(logprobs)} {of}", all(logprobs)
            ),
            need(
                "as many tokens are cached",
                f"stock, policy: {cached}",
                all(one == two for one, two in cached),
            ),
        ],
        {"requests": len(pairs), "first_other_token": [_first_other(*pair) for pair in pairs]},
    )


def _first_other(one: Answer, two: Answer) -> int | None:
    """Index of the first token whose id or log-probability differs."""
    same = zip(one.ids, one.logprobs, two.ids, two.logprobs, strict=False)
    return next((n for n, (a, p, b, q) in enumerate(same) if a != b or p != q), None)
