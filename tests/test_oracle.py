"""The real server generates what an independent decoder with the same policy would."""

from __future__ import annotations

import pytest

from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from tests import judging
from tests.client import Ask, send_all, tokens_of
from tests.conftest import Running
from tests.setups import SETUPS

WITH_POLICY = [name for name in SETUPS if name.startswith("page")]
OTHER_ROPE = ["llama3", "yarn"]

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


def check(running: Running, policies: list[dict[str, object]]) -> None:
    oracle = Oracle(running.model, running.stats)
    judging.check(oracle, running, send_all(running, workload(policies)))


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
    assert answer.error(full.logprobs) > 100 * judging.Limits().logprobs
