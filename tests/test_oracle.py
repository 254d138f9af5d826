"""The real server generates what an independent decoder with the same policy would."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.simulator.oracle import Oracle, Replay
from bench.simulator.registry import make_policy
from tests.client import Answer, Ask, recorded_rounds, send_all, simulated, tokens_of
from tests.conftest import Running
from tests.setups import SETUPS

WITH_POLICY = [name for name in SETUPS if name.startswith("page")]
OTHER_ROPE = ["llama3", "yarn"]
LOGPROB_TOLERANCE = 1e-4
LEAST_ROUNDS = 5
RAW_SCORES = 50  # Their size in these models; normalized ones are of order 1.
MOST_FOLLOWED = 0.001  # Share of choices where a near tie was decided by the server.

SHARED = tokens_of("A shared prefix that several requests begin with, long enough for some pages. ")
LONG_PROMPT = 4  # Which request of a workload is prefilled in several chunks.
MODES = ("per-head", "per-layer-per-head", "union")
TRIATTENTION = [
    *({"eviction_mode": mode} for mode in MODES),
    *({"eviction_mode": mode, "normalize": False} for mode in MODES),
]
STREAMING = [
    {"policy": "streaming"},
    {"policy": "streaming", "sinks": 0, "budget": 40, "interval": 30},
]
RANDOM = [{"policy": "random"}, {"policy": "random", "budget": 40, "interval": 30}]
ODD = [
    {"recent": 0, "budget": 61, "interval": 17, "reuse": "prompt"},
    {"recent": 17, "budget": 17, "interval": 17},
]


def workload(policies: list[dict[str, object]]) -> list[Ask]:
    """Different lengths, half over a shared prefix, half sampled instead of greedy."""
    asks = []
    for index, policy in enumerate(policies):
        text = f"Request {index} has words of its own" + "," * index
        text *= 10 if index == LONG_PROMPT else 1
        prompt = (SHARED if index % 2 else []) + tokens_of(text)
        temperature = 1.0 if index % 3 == 0 else 0.0
        asks.append(Ask(prompt, 205 + 5 * index, policy, temperature))
    return asks


def replay(oracle: Oracle, running: Running, answer: Answer) -> Replay:
    own = answer.ask.policy
    return oracle.replay(
        answer.ask.prompt,
        answer.ids,
        simulated(own),
        page_size=running.setup.page_size,
        recorded=recorded_rounds(running.trace, answer.rid)
        if own.get("policy") != "none"
        else None,
        tolerance=1e-5 if own.get("normalize", True) else 1e-5 * RAW_SCORES,
    )


def check(running: Running, policies: list[dict[str, object]]) -> None:
    oracle = Oracle(running.model, running.stats)
    counts: Counter[str] = Counter()
    for answer in send_all(running, workload(policies)):
        judged = replay(oracle, running, answer)
        difference = answer.error(judged.logprobs)
        assert difference < LOGPROB_TOLERANCE, (answer.ask.policy, difference)
        if answer.ask.temperature == 0:
            assert judged.greedy.tolist() == answer.ids, answer.ask.policy
        if answer.ask.policy.get("policy") != "none":
            assert len(judged.rounds) >= LEAST_ROUNDS
            # With overlap, a step beyond the last token is already under way when it is known.
            assert judged.surplus in (0, 1)
            assert answer.meta["kv_policy"]["rounds"] == len(judged.rounds) + judged.surplus
        else:
            assert "kv_policy" not in answer.meta
        counts["choices"] += sum(done.kept.size for done in judged.rounds)
        counts["followed"] += judged.followed
    assert counts["followed"] <= MOST_FOLLOWED * counts["choices"]


@pytest.mark.parametrize("server", WITH_POLICY, indirect=True)
def test_every_policy_and_mode(server: Running) -> None:
    check(server, [*TRIATTENTION, *STREAMING, *RANDOM, *ODD, {"policy": "none"}])


@pytest.mark.parametrize("server", OTHER_ROPE, indirect=True)
def test_other_rope(server: Running) -> None:
    check(server, [*TRIATTENTION, {"policy": "none"}])


@pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
def test_eviction_is_visible(server: Running) -> None:
    """The oracle without eviction disagrees: the comparison above can fail."""
    (answer,) = send_all(server, [Ask(tokens_of("Visible?"), 250, {}, 1.0)])
    oracle = Oracle(server.model, server.stats)
    full = oracle.replay(answer.ask.prompt, answer.ids, make_policy("none"))
    assert answer.error(full.logprobs) > 100 * LOGPROB_TOLERANCE
