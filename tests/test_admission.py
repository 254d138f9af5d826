"""What the scheduler reserves for a request is what it will hold, and what is free is used."""

from __future__ import annotations

import contextlib
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import schedule_policy

from bench.simulator.oracle import Oracle
from sglang_tri.config import KvPolicyConfig
from sglang_tri.engine import Engine
from sglang_tri.history import Lookup
from sglang_tri.patches.versions import scheduling
from sglang_tri.request.region import slots_for
from sglang_tri.request.request import Request
from sglang_tri.round.run import KvCache
from tests.client import Ask, recorded_rounds, send, send_all, simulated, tokens_of
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL, SMALL_POOL
from tests.steps import decode_steps

SMALL = pytest.mark.parametrize("server", ["llama3"], indirect=True)
FOOTPRINT = BUDGET + INTERVAL


@pytest.mark.parametrize(
    ("tokens", "page", "regions", "slots"),
    [
        (0, 1, 1, 0),
        (5, 1, 1, 5),
        (5, 4, 1, 8),
        (16, 1, 1, 15),
        (16, 4, 1, 16),
        (17, 4, 1, 20),
        (21, 4, 1, 20),
        (1 << 30, 1, 1, 15),
        (1 << 30, 1, 2, 30),
        (20, 1, 2, 20),
    ],
)
def test_slots_of_an_output(tokens: int, page: int, regions: int, slots: int) -> None:
    """min(tokens, budget + interval), in whole pages."""
    settings = KvPolicyConfig(policy="streaming", budget=10, interval=5, recent=2, reuse="prompt")
    assert slots_for(settings, tokens, page, regions) == slots


def test_a_running_request_takes_what_is_left_until_its_next_round() -> None:
    settings = KvPolicyConfig(policy="streaming", budget=10, interval=5, recent=2, reuse="prompt")
    request = Request("r", settings, Lookup((settings, None)), 100)
    assert request.slots_to_come(100, 1000) == 15
    request.decoded(100, array("q"))
    assert [request.slots_to_come(physical, 1000) for physical in (100, 109, 115)] == [15, 6, 0]
    assert request.slots_to_come(100, 3) == 3


def test_sglang_expects_less_only_inside() -> None:
    """And nothing of a request that ignores the end of sequence without a radix cache."""
    clip = schedule_policy.CLIP_MAX_NEW_TOKENS
    req: Any = SimpleNamespace(sampling_params=SimpleNamespace(ignore_eos=True))
    with contextlib.suppress(RuntimeError), scheduling.expecting(req, 7):
        assert schedule_policy.CLIP_MAX_NEW_TOKENS == 7
        assert not req.sampling_params.ignore_eos
        raise RuntimeError
    assert clip == schedule_policy.CLIP_MAX_NEW_TOKENS
    assert req.sampling_params.ignore_eos
    adder: Any = SimpleNamespace(new_token_ratio=0.5)
    assert scheduling.expected(adder, clip + 1) == clip / 2


def test_memory_of_the_policy_itself() -> None:
    """Eight bytes for each row of the slot table, whatever the budget; the rest is scratch."""
    keys = [torch.zeros(64, 2, 8)]
    for rows in (10, 4097):
        for budget in (32, 4096):
            settings = KvPolicyConfig(policy="triattention", budget=budget)
            engine = Engine(settings, KvCache.of(keys, keys, 1), rows)
            held = [value for value in vars(engine).values() if torch.is_tensor(value)]
            assert sum(tensor.nbytes for tensor in held) == 8 * rows


def test_an_id_that_is_sent_again() -> None:
    """An aborted request may be released when its id is another request's already."""
    keys = [torch.zeros(64, 2, 8)]
    settings = KvPolicyConfig(policy="streaming", budget=32)
    engine = Engine(settings, KvCache.of(keys, keys, 1), rows=2)
    aborted, again = (engine.queue("same", array("q", [1]), settings) for _ in range(2))
    assert aborted is not None
    assert again is not None
    again.decoded(40, array("q"))
    again.evicted()
    engine.start_prefill(torch.tensor([1]), [again])
    engine.released(aborted, 0)
    assert engine.shifts_positions
    engine.released(again, 40)
    assert not engine.shifts_positions


@SMALL
def test_waiting_requests_are_admitted_while_nobody_finishes(server: Running) -> None:
    """Stock reserves each output, so that one of these fills the pool."""
    server.server.flush_cache()
    begin = server.server.log.stat().st_size
    tokens = SMALL_POOL * 3 // 4
    prompts = [tokens_of(f"{number} wait for nobody") for number in range(8)]
    send_all(server, [Ask(prompt, tokens, {}) for prompt in prompts])
    running, slots = zip(*decode_steps(server.server.log, begin), strict=True)
    assert max(running) == len(prompts)
    assert running.index(len(prompts)) < tokens // 2
    assert max(slots) <= sum(len(prompt) + FOOTPRINT for prompt in prompts) < SMALL_POOL


@SMALL
def test_an_output_longer_than_the_pool(server: Running) -> None:
    """And it is what the oracle says."""
    request = Ask(tokens_of("Longer than the pool"), SMALL_POOL + 500)
    answer = send(server, request)
    assert len(answer.ids) == SMALL_POOL + 500
    oracle = Oracle(server.model, server.stats)
    judged = oracle.replay(
        request.prompt, answer.ids, simulated({}), 1, recorded_rounds(server.trace, answer.rid)
    )
    assert answer.error(judged.logprobs) < 1e-4
    assert len(judged.rounds) > SMALL_POOL // INTERVAL


@SMALL
def test_the_context_still_bounds_outputs(server: Running) -> None:
    response = server.server.post(
        "/generate", input_ids=[65, 66], sampling_params={"max_new_tokens": 8192}
    )
    assert response.status_code == 400
    assert "8192" in response.text


@SMALL
def test_a_request_that_can_never_fit(server: Running) -> None:
    """Refused at once, with the numbers; one that fits is not."""
    length = SMALL_POOL - FOOTPRINT
    params = {"max_new_tokens": 4 * FOOTPRINT, "ignore_eos": True}
    response = server.server.post("/generate", input_ids=[65] * length, sampling_params=params)
    assert response.status_code == 400
    for number in (length, 4 * FOOTPRINT, f"--kv-budget {BUDGET}", f"the pool has {SMALL_POOL}"):
        assert f"{number}" in response.text
    fits = Ask([66] * (length - 2 * FOOTPRINT - 10), 4 * FOOTPRINT, {})
    assert len(send(server, fits).ids) == 4 * FOOTPRINT
    server.server.flush_cache()
