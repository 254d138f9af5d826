"""A thousand random turns with retraction and preemption, under strict memory checks."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from tests.client import Answer, Ask, recorded_rounds, send, send_all, tokens_of
from tests.conftest import Running
from tests.probing import ask
from tests.setups import ALIAS_LIMIT, FUZZ_POOL
from tests.test_serving import wait_idle

LONGEST = FUZZ_POOL // 3  # Of the prompts.
# `make soak` sends more.
REQUESTS, AT_ONCE = int(os.environ.get("FUZZ_REQUESTS", "700")), 16
POLICIES: list[dict[str, Any]] = [
    {"budget": 24, "interval": 16},
    {"budget": 18, "interval": 17, "eviction_mode": "per-layer-per-head"},
    {"budget": 12, "interval": 8, "recent": 4, "eviction_mode": "union", "reuse": "prompt"},
    {"policy": "streaming", "budget": 20, "interval": 16},
    {"policy": "none"},
]
FUZZED = pytest.mark.parametrize("server", ["fuzz-page1", "fuzz-page4"], indirect=True)


def random_request(rng: random.Random, index: int) -> dict[str, Any]:
    prefix = "shared system prompt " * rng.choice([0, 1, 4, 20])
    if rng.random() < 0.1:  # Long, and nobody else's.
        prefix = f"{index:06} " * rng.randint(1, LONGEST // 7 - 8)
    params = {
        "max_new_tokens": rng.choice([1, 2, rng.randint(3, 30), rng.randint(30, 110)]),
        "temperature": rng.choice([0.0, 1.0]),
        "ignore_eos": True,
        "custom_params": {"kv_policy": rng.choice(POLICIES)},
    }
    if rng.random() < 0.1:
        params["n"] = 2
    if rng.random() < 0.2:
        params["stop"] = rng.choice([["a"], ["ab"], list("abcdefgh")])
    return {
        "text": prefix + f"{rng.randint(0, 40)} tail" * rng.randint(1, 8),
        "sampling_params": params,
        "priority": rng.randint(0, 2),
        "rid": f"fuzz-{index}",
        "require_reasoning": index % 5 == 0,
    }


def run_one(running: Running, index: int) -> str:
    rng = random.Random(index)
    request = random_request(rng, index)
    aborted = rng.random() < 0.1 and "n" not in request["sampling_params"]
    if "n" in request["sampling_params"]:
        del request["rid"]
    if aborted:
        threading.Timer(rng.random(), abort, (running, request["rid"])).start()
    response = running.server.post("/generate", **request)
    if not response.ok:
        assert aborted, response.text
        return "abort"
    body = response.json()
    answer = body[0] if isinstance(body, list) else body
    if rng.random() < 0.3:
        go_on(running, request, answer)
    return answer["meta_info"]["finish_reason"]["type"]


def go_on(running: Running, request: dict[str, Any], answer: dict[str, Any]) -> None:
    """The next turn, over all that was said so far."""
    said = tokens_of(request["text"]) + answer["output_ids"]
    params = {key: value for key, value in request["sampling_params"].items() if key != "n"}
    more = {"input_ids": said + tokens_of(" Go on."), "sampling_params": params}
    assert running.server.post("/generate", **more, priority=request["priority"]).ok


def abort(running: Running, rid: str) -> None:
    running.server.post("/abort_request", rid=rid)


@FUZZED
def test_random_requests(server: Running) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        reasons = list(pool.map(lambda index: run_one(server, index), range(REQUESTS)))
    counts = {reason: reasons.count(reason) for reason in set(reasons)}
    print(f"{counts} in {time.monotonic() - began:.0f} s")
    assert set(counts) == {"length", "stop", "abort"}
    assert counts["abort"] < REQUESTS / 10
    assert wait_idle(server)["preempted"] > 0
    report = server.server.kv_policy()
    assert report["rounds"] > 500
    assert report["alias_hits"] > 10
    log = server.server.log.read_text()
    assert "#retracted_reqs: " in log
    assert "memory leak" not in log


@pytest.mark.parametrize(
    ("server", "reuse"),
    [("fuzz-page1", "continuation"), ("fuzz-page1", "prompt"), ("fuzz-page4", "continuation")],
    indirect=["server"],
)
def test_outputs_longer_than_the_pool_survive_retraction(server: Running, reuse: str) -> None:
    """What one has generated would fill the pool: stock could never admit it again.

    None holds more than its prompt, budget and interval, however often it is retracted.
    """
    server.server.flush_cache()
    settings = {"budget": 40, "interval": 40, "reuse": reuse}
    ask(server.probe)
    asks = [Ask(tokens_of(f"{reuse} {n} Long"), FUZZ_POOL + 200, settings, 1.0) for n in range(3)]
    answers = send_all(server, asks)
    report = ask(server.probe)
    for answer in answers:
        assert len(answer.ids) == FUZZ_POOL + 200
        assert len(report["resumed"].get(answer.rid, [])) == answer.meta["num_retractions"]
        assert answer.meta["kv_policy"]["resident_slots"] <= len(answer.ask.prompt) + 80 + 3
    assert sum(answer.meta["num_retractions"] for answer in answers) > 20
    if reuse == "prompt":  # Nothing of it lies in the tree.
        assert report["peak_used"] <= sum(len(request.prompt) + 80 + 6 for request in asks)
    answer = max(answers, key=lambda answer: answer.meta["num_retractions"])
    if not any(computed_twice(server, answer, *found) for found in report["resumed"][answer.rid]):
        exact_so_far(server, answer, {"budget": 40, "interval": 40}, 600)


def exact_so_far(server: Running, answer: Answer, settings: dict[str, Any], tokens: int) -> None:
    """The first `tokens` output tokens are those of the oracle, which was never interrupted."""
    judged = Oracle(server.model, server.stats).replay(
        answer.ask.prompt,
        answer.ids[:tokens],
        make_policy("triattention", **settings),
        server.setup.page_size,
    )
    assert answer.error(judged.logprobs) < 1e-4


@FUZZED
def test_exact_after_the_storm(server: Running) -> None:
    settings = {"budget": 32, "interval": 16}
    request = Ask(tokens_of("After the storm."), 200, settings, temperature=1.0)
    answer = send(server, request)
    oracle = Oracle(server.model, server.stats)
    policy = make_policy("triattention", **settings)
    judged = oracle.replay(request.prompt, answer.ids, policy, server.setup.page_size)
    assert answer.error(judged.logprobs) < 1e-4
    assert len(judged.rounds) >= 5


@FUZZED
@pytest.mark.parametrize("reuse", ["continuation", "prompt"])
def test_retracted_requests_are_exact(server: Running, reuse: str) -> None:
    """They take back what they have left, or are prefilled round by round: as if nothing was."""
    settings = {"budget": 20, "interval": 16}
    oracle = Oracle(server.model, server.stats)
    policy = make_policy("triattention", **settings)
    verified = 0
    for attempt in range(8):
        length = 130 + 11 * attempt  # Retractions come at a fixed interval: meet it out of step.
        prompts = [tokens_of(f"{attempt} {n} Retract me") for n in range(6)]
        own = {**settings, "reuse": reuse}
        answers = send_all(
            server, [Ask(prompt, length, own, temperature=1.0) for prompt in prompts]
        )
        resumed = ask(server.probe)["resumed"]
        for answer in answers:
            found = resumed.get(answer.rid, [])
            assert len(found) == answer.meta["num_retractions"]
            if any(computed_twice(server, answer, *resume) for resume in found):
                continue
            compressed = [reused for _, reused in found if reused > len(answer.ask.prompt)]
            verified += len(compressed if reuse == "continuation" else found)
            assert reuse == "continuation" or not compressed
            judged = oracle.replay(
                answer.ask.prompt,
                answer.ids,
                policy,
                server.setup.page_size,
                recorded_rounds(server.trace, answer.rid),
            )
            assert answer.meta["kv_policy"]["rounds"] - len(judged.rounds) in (0, 1)
            assert answer.error(judged.logprobs) < 1e-4
        if verified >= 3:
            return
    pytest.fail(f"only {verified} retractions could be judged")


def computed_twice(server: Running, answer: Answer, outputs: int, reused: int) -> bool:
    """Whether a resumed request computed tokens again that a round has already passed.

    The tree holds whole pages, so that the last tokens are computed anew, over what is left.
    """
    prompt = len(answer.ask.prompt)
    rounds = [int(np.load(path)["logical"]) for path in server.trace.glob(f"{answer.rid}-*.npz")]
    again = range(reused + 1, prompt + outputs + 1)
    return reused > prompt and any(length in again for length in rounds)


@pytest.mark.parametrize("server", ["fuzz-page1"], indirect=True)
def test_a_full_store_forgets_the_oldest(server: Running) -> None:
    """More conversations than --kv-alias-limit: the first ones start again, with right answers."""
    settings = {"budget": 16, "interval": 16}
    server.server.flush_cache()
    oracle = Oracle(server.model, server.stats)
    policy = make_policy("triattention", **settings)
    talks = [oracle.conversation(policy) for _ in range(ALIAS_LIMIT + 1)]
    first = [Ask(tokens_of(f"{index:3} talk"), 34, settings) for index in range(len(talks))]
    firsts = [send(server, request) for request in first]
    assert server.server.kv_policy()["live_spans"] == ALIAS_LIMIT
    for number, kept in ((0, "exact"), (len(talks) - 1, "compressed")):
        answer, talk = firsts[number], talks[number]
        talk.turn(answer.ask.prompt, answer.ids, 0, recorded_rounds(server.trace, answer.rid))
        prompt = answer.ask.prompt + answer.ids + tokens_of(" go on")
        again = send(server, Ask(prompt, 40, settings))
        assert again.meta["kv_policy"]["history"] == kept
        cached = again.meta["cached_tokens"]
        judged = talk.turn(prompt, again.ids, cached, recorded_rounds(server.trace, again.rid))
        assert again.error(judged.logprobs) < 1e-4
