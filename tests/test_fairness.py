"""Nobody waits for ever, although requests are retracted again and again."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import requests

from tests.client import Ask, send, tokens_of
from tests.conftest import Running
from tests.probing import ask
from tests.setups import FUZZ_ROWS

CLIENTS, EACH = 14, 5


@dataclass(frozen=True)
class Stay:
    """One request: when it came and went, by number of the event, and its retractions."""

    came: int
    went: int
    retractions: int


@pytest.mark.full
@pytest.mark.parametrize("server", ["fuzz-page1", "fuzz-page4"], indirect=True)
def test_waiting_is_bounded(server: Running) -> None:
    """Equal requests of equal clients in a pool that holds half of them.

    One that is retracted waits behind those that are waiting then, and behind nobody who comes
    later; those that run together may end in any order.
    """
    server.server.flush_cache()
    clock = count()
    settings = {"budget": 60, "interval": 30}

    def stay(number: int) -> Stay:
        came = next(clock)
        answer = send(server, Ask(tokens_of(f"{number:3} " * 30), 200, settings))
        return Stay(came, next(clock), answer.meta["num_retractions"])

    def client(number: int) -> list[Stay]:
        return [stay(EACH * number + turn) for turn in range(EACH)]

    with ThreadPoolExecutor(CLIENTS) as pool:
        stays = [stay for stays in pool.map(client, range(CLIENTS)) for stay in stays]
    assert sum(stay.retractions for stay in stays) > CLIENTS
    for stay in stays:
        assert overtaken(stay, stays) <= FUZZ_ROWS + CLIENTS * stay.retractions


@pytest.mark.parametrize("server", ["fuzz-page1", "fuzz-page4"], indirect=True)
def test_nobody_is_lost_who_was_preempted_in_vain(server: Running) -> None:
    """SGLang displaces one for an important request before it has counted that one's prompt.

    If the prompt has no room even then, neither runs: the displaced one must not be forgotten.
    """
    preempted = ask(server.probe)["preempted"]
    # Retractions, which this server is made to have, can make room before it comes to that.
    for _ in range(10):
        answers = displace(server)
        assert all(len(answer["output_ids"]) == 300 for answer in answers)
        if ask(server.probe)["preempted"] > preempted:
            return
    pytest.fail("nobody was preempted")


def displace(server: Running) -> list[Any]:
    """Answers to as many humble requests as there are rows, and to an important one among them."""
    server.server.flush_cache()

    def come(text: str, tokens: int, priority: int) -> Future[Any]:
        own = {"kv_policy": {"budget": 40, "interval": 40}}
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "custom_params": own}
        body = {"text": text, "sampling_params": sampling, "priority": priority}
        url = f"{server.server.url}/generate"
        return pool.submit(lambda: requests.post(url, json=body, timeout=60).json())

    with ThreadPoolExecutor(FUZZ_ROWS + 1) as pool:
        rounds = server.server.kv_policy()["rounds"]
        coming = [come(f"{number} humble " * 10, 300, 0) for number in range(FUZZ_ROWS)]
        while server.server.kv_policy()["rounds"] < rounds + FUZZ_ROWS:
            time.sleep(0.05)
        coming.append(come("Important and long. " * 25, 300, 1))
        return [future.result() for future in coming]


def overtaken(stay: Stay, stays: list[Stay]) -> int:
    """How many came later and went earlier."""
    return sum(other.came > stay.came and other.went < stay.went for other in stays)
