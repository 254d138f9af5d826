"""Nobody waits for ever, although requests are retracted again and again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import pytest

from tests.client import Ask, send, tokens_of
from tests.conftest import Running
from tests.setups import FUZZ

CLIENTS, EACH = 14, 5
AT_ONCE = int(FUZZ[FUZZ.index("--max-running-requests") + 1])


@dataclass(frozen=True)
class Stay:
    """One request: when it came and went, by number of the event, and its retractions."""

    came: int
    went: int
    retractions: int


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
    print(sorted((overtaken(stay, stays), stay.retractions) for stay in stays)[-8:])
    assert sum(stay.retractions for stay in stays) > CLIENTS
    for stay in stays:
        assert overtaken(stay, stays) <= AT_ONCE + CLIENTS * stay.retractions
    assert max(overtaken(stay, stays) for stay in stays) <= 2 * CLIENTS


def overtaken(stay: Stay, stays: list[Stay]) -> int:
    """How many came later and went earlier."""
    return sum(other.came > stay.came and other.went < stay.went for other in stays)
