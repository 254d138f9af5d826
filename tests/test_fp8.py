"""A KV cache of 8-bit floats: the real server against a decoder that rounds keys and values.

Two computations of one key differ in their last bits, and now and then 8 bits round them apart: by
a step of 6 to 12 percent, that all later tokens see. So most answers are the decoder's, not all.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.models.tiny import make_model
from bench.simulator import Conversation, Replay, RoundMismatch
from bench.simulator.decoder import Decoder
from bench.simulator.oracle import Oracle
from tests.client import Answer, Ask, recorded_rounds, send, send_all, simulated, tokens_of
from tests.conftest import Running

SERVED = pytest.mark.parametrize("server", ["fp8"], indirect=True)
E4M3 = torch.float8_e4m3fn
SMALL = {"budget": 32, "interval": 16}
LONG, LEAST_ROUNDS = 150, 7
POLICIES: list[dict[str, Any]] = [
    SMALL,
    {**SMALL, "eviction_mode": "union"},
    {**SMALL, "eviction_mode": "per-layer-per-head"},
    {**SMALL, "policy": "streaming"},
    {"policy": "none"},
]
EACH, TALKS = 5, 12


def replay(oracle: Oracle, running: Running, answer: Answer) -> Replay:
    """Raises RoundMismatch where a round is not the oracle's."""
    own = answer.ask.policy
    rounds = recorded_rounds(running.trace, answer.rid) if evicts(own) else None
    page_size = running.setup.page_size
    judged = oracle.replay(answer.ask.prompt, answer.ids, simulated(own), page_size, rounds)
    assert not evicts(own) or len(judged.rounds) >= LEAST_ROUNDS
    return judged


def evicts(policy: dict[str, Any]) -> bool:
    return policy.get("policy") != "none"


def mostly_equal(judged: Replay, answer: Answer) -> bool:
    return float(np.median(np.abs(judged.logprobs - answer.logprobs))) < 1e-4


@SERVED
def test_every_mode(server: Running) -> None:
    """Of most answers all rounds are the decoder's, and half of the log-probabilities to 1e-4."""
    oracle = Oracle(server.model, server.stats, kv_dtype=E4M3)
    asks = [
        Ask(tokens_of(f"Request {number} in mode {mode}."), LONG, policy)
        for number in range(EACH)
        for mode, policy in enumerate(POLICIES)
    ]
    equal = [0] * len(POLICIES)
    for answer in send_all(server, asks):
        with suppress(RoundMismatch):
            mode = POLICIES.index(answer.ask.policy)
            equal[mode] += mostly_equal(replay(oracle, server, answer), answer)
    assert min(equal) > 0
    assert sum(equal) > len(asks) / 2


@SERVED
def test_next_turns(server: Running) -> None:
    """They go on from compressed history, as it lies in the cache."""
    oracle = Oracle(server.model, server.stats, kv_dtype=E4M3)
    talks = [oracle.conversation(simulated(SMALL)) for _ in range(TALKS)]
    begins = [tokens_of(f"{number} talks in eight bits.") for number in range(TALKS)]
    firsts = send_all(server, [Ask(begin, LONG, SMALL) for begin in begins])
    nexts = [Ask([*one.ask.prompt, *one.ids, *tokens_of(" Next.")], LONG, SMALL) for one in firsts]
    equal = 0
    for talk, first, second in zip(talks, firsts, send_all(server, nexts), strict=True):
        cached = second.meta["cached_tokens"]
        assert second.meta["kv_policy"]["history"] == "compressed"
        assert cached >= len(first.ask.prompt) + len(first.ids) - 1
        with suppress(RoundMismatch):
            turns = zip((first, second), (0, cached), strict=True)
            equal += all(follow(server, talk, answer, reused) for answer, reused in turns)
    assert equal > TALKS / 3


def follow(server: Running, talk: Conversation, answer: Answer, cached: int) -> bool:
    rounds = recorded_rounds(server.trace, answer.rid)
    return mostly_equal(talk.turn(answer.ask.prompt, answer.ids, cached, rounds), answer)


@SERVED
def test_rounding_is_visible(server: Running) -> None:
    """A decoder that does not round disagrees about rounds and log-probabilities."""
    oracle = Oracle(server.model, server.stats)
    answer = send(server, Ask(tokens_of("Visible?"), LONG, SMALL))
    with pytest.raises(RoundMismatch):
        replay(oracle, server, answer)
    answer = send(server, Ask(tokens_of("Visible?"), LONG, {"policy": "none"}))
    assert not mostly_equal(replay(oracle, server, answer), answer)


@pytest.mark.parametrize("kind", ["qwen3", "llama3", "yarn"])
def test_the_decoder_turns_cached_keys_back(tmp_path: Path, kind: str) -> None:
    """What is scored is what is cached; without rounding, that is the key before RoPE."""
    model = make_model(kind, tmp_path)
    caches = []
    for kv_dtype in (None, torch.float32, E4M3):
        decoder = Decoder(model, kv_dtype=kv_dtype)
        caches.append(decoder.new_cache())
        decoder.feed(list(range(40, 100)), 1000, caches[-1])
    plain, same, rounded = (cache[0] for cache in caches)
    torch.testing.assert_close(same.keys, plain.keys, rtol=1e-4, atol=1e-4)
    for cached in (rounded.rotated, rounded.values):
        assert torch.equal(cached, cached.to(E4M3).float())
    step = (rounded.keys - plain.keys).norm() / plain.keys.norm()
    assert 0.01 < step < 0.06
