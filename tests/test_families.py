"""The decoder that masks what was evicted, and what is said of a model by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.accuracy.client import Ask, Recorded, send
from bench.accuracy.families.__main__ import Found, judge
from bench.accuracy.families.masked import Masked, visible
from tests.client import tokens_of
from tests.conftest import Running


def test_who_sees_whom() -> None:
    """Two tokens of prompt; of the next three the second is evicted, then the third."""
    rounds = Recorded([np.array([[[2, 4]]]), np.array([[[2, 5]]])], [5, 6])
    seen = visible(2, 8, rounds)
    assert torch.equal(seen[:5], torch.ones(5, 8, dtype=torch.bool).tril())
    assert seen[5].nonzero().flatten().tolist() == [0, 1, 2, 4, 5]
    assert seen[6].nonzero().flatten().tolist() == [0, 1, 2, 5, 6]
    assert seen[7].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
def test_the_server_is_right_by_it(server: Running) -> None:
    answer = send(server.server, Ask(tokens_of("Who sees whom?"), 200, {"eviction_mode": "union"}))
    record = Recorded.read(server.trace, answer.rid)
    decoder = Masked(server.model)
    found = judge(decoder, [answer], [record], reused=True)
    assert found.rounds == len(record.kept) >= 5
    assert found.verdict == "right"

    first, *rest = record.kept
    other = first.copy()
    other[..., 0] = next(n for n in range(first.min(), first.max()) if n not in first)
    altered = Recorded([other, *rest], record.lengths)
    assert judge(decoder, [answer], [altered], reused=True).verdict == "WRONG"
    shifted = replace(answer, logprobs=answer.logprobs + 0.01)
    differs = judge(decoder, [shifted], [record], reused=True)
    assert differs.verdict == "SGLang and transformers differ"


def test_a_verdict_needs_reuse_and_a_control() -> None:
    right = Found(rounds=9, before=1e-6, error=1e-5, control=1.0, reused=True)
    assert right.verdict == "right"
    assert replace(right, reused=False).verdict == "WRONG"
    assert replace(right, control=1e-4).verdict == "WRONG"
    assert replace(right, failure="no memory").verdict == "did not start"
