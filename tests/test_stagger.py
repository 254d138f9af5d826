"""First rounds of requests that are admitted together are staggered: early, never late."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_tri.config import KvPolicyConfig
from sglang_tri.engine import Engine
from sglang_tri.history import Lookup
from sglang_tri.request.region import ceil_to, slots_for, stagger_slots
from sglang_tri.request.request import Request
from sglang_tri.round.plan import DueRequest
from sglang_tri.round.run import KvCache
from tests.client import Answer, Ask, send, send_all, stagger, tokens_of
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL

OVERLAP = pytest.mark.parametrize("server", ["page1-overlap", "page4-overlap"], indirect=True)
PAGES = st.sampled_from([1, 4, 16, 64])
PROMPTS = st.lists(st.integers(0, 200_000), max_size=40).map(lambda ids: array("q", ids))
# Of the server's requests.
RECENT, REQUESTS = 16, 20


def settings_of(budget: int, interval: int, recent: int) -> KvPolicyConfig:
    return KvPolicyConfig("streaming", budget, interval, recent, sinks=0, reuse="prompt")


@st.composite
def any_settings(draw: st.DrawFn) -> KvPolicyConfig:
    recent = draw(st.integers(0, 40))
    budget = draw(st.integers(max(1, recent), 90))
    return settings_of(budget, draw(st.integers(max(1, recent), 90)), recent)


def prompts_of(count: int) -> list[array[int]]:
    rng = random.Random(count)
    return [array("q", rng.choices(range(50_000), k=20)) for _ in range(count)]


@given(any_settings(), PROMPTS, PAGES)
def test_the_bounds(settings: KvPolicyConfig, prompt: array[int], page: int) -> None:
    """Whole pages; what the first round evicts is a page at least, and no recent token."""
    slots = stagger_slots(settings, prompt, page)
    assert slots % page == 0
    left = ceil_to(settings.interval, page) - slots
    assert max(settings.recent, page) <= left <= ceil_to(settings.interval, page)
    assert stagger_slots(settings, array("q", list(prompt)), page) == slots


@pytest.mark.parametrize(
    ("interval", "recent", "page", "values"),
    [
        (20, 16, 1, range(5)),
        (20, 0, 1, range(20)),
        (20, 16, 4, (0, 4)),
        (30, 16, 8, (0, 8, 16)),
        (30, 16, 64, (0,)),
        (16, 16, 1, (0,)),
        (64, 64, 64, (0,)),
        (1, 0, 1, (0,)),
        (1, 1, 1, (0,)),
    ],
)
def test_all_of_the_room_is_used(
    interval: int, recent: int, page: int, values: tuple[int, ...]
) -> None:
    """Each number of pages about as often; none where all of the interval is recent."""
    settings = settings_of(64, interval, recent)
    prompts = prompts_of(4000)
    found = Counter(stagger_slots(settings, prompt, page) for prompt in prompts)
    assert sorted(found) == list(values)
    assert min(found.values()) > len(prompts) / len(values) / 2


def test_known_values() -> None:
    """They stay what they are: a request gives the same answer after an upgrade, and elsewhere."""
    settings = KvPolicyConfig("triattention")
    prompts = [array("q", ids) for ids in ([], [1], [1, 2, 3], range(100_000))]
    assert [stagger_slots(settings, prompt, 1) for prompt in prompts] == [0, 12, 88, 39]
    assert [stagger_slots(settings, prompt, 16) for prompt in prompts] == [0, 112, 112, 80]


def engine_of(settings: KvPolicyConfig, page: int = 1, rows: int = 4) -> Engine:
    cache = [torch.zeros(page, 1, 2)]
    return Engine(settings, KvCache.of(cache, cache, page), rows)


def test_only_the_prompt_counts() -> None:
    engine = engine_of(KvPolicyConfig("streaming"))
    for prompt in prompts_of(20):
        states = [
            engine.queue(rid, prompt, engine.settings, key)
            for rid, key in (("a", None), ("b", "salt"))
        ]
        assert {state.stagger for state in states if state} == {
            stagger_slots(engine.settings, prompt, 1)
        }


@given(any_settings(), PROMPTS, PAGES, st.integers(0, 70), st.data())
def test_held_slots(
    settings: KvPolicyConfig, prompt: array[int], page: int, length: int, data: st.DataObject
) -> None:
    """The first round is early, the others an interval apart; the footprint is never exceeded.

    Of the region behind the end of thinking none is early.
    """
    interval, kept = ceil_to(settings.interval, page), ceil_to(settings.budget, page)
    first = stagger_slots(settings, prompt, page)
    request = Request("r", settings, Lookup(None), length, page, stagger=first)
    for early_slots, steps in ((first, data.draw(st.integers(0, 400))), (0, 400)):
        request._open_region(length)
        region = request.regions[-1]
        rounds = []
        for step in range(steps):
            if length == region.due_at:
                rounds.append((step, length - region.start))
                assert request.evicted() == rounds[-1][1] - kept
                length = region.start + kept
            assert length < region.due_at
            length += 1
            assert length - region.opened <= slots_for(settings, 1 << 30, page) + page - 1
            assert request.slots_to_come(length, 1 << 30) >= region.due_at - length
        fill = region.start - region.opened + kept + interval
        due = range(fill - early_slots, steps, interval)
        sizes = [kept + interval - early_slots, *[kept + interval] * steps]
        assert rounds == list(zip(due, sizes, strict=False))


def test_requests_admitted_together_evict_in_many_steps() -> None:
    """256 of them with the default settings, over their first and their later rounds."""
    engine = engine_of(KvPolicyConfig("streaming"))
    settings, count = engine.settings, 256
    due: Counter[int] = Counter()
    for prompt in prompts_of(count):
        request = engine.queue("r", prompt, engine.settings)
        assert request is not None
        request.decoded(20, array("q"))
        for region in request.regions * 3:
            due[region.due_at + region.evicted] += 1
            request.evicted()
    full = 20 + settings.budget + settings.interval
    assert min(due) >= full - settings.interval + settings.recent
    assert max(due) <= full + 2 * settings.interval
    assert len(due) > 3 * (settings.interval - settings.recent) * 0.8
    assert max(due.values()) < count / 20


def test_a_step_with_first_and_later_rounds() -> None:
    """Requests of equal settings with other numbers of candidates: each frees its own tail."""
    settings = settings_of(10, 6, 2)
    engine = engine_of(settings)
    table = torch.arange(400, dtype=torch.int32).view(4, 100)
    requests = [Request("", settings, Lookup(None), 5, stagger=slots) for slots in (0, 3, 4, 3)]
    for request in requests:
        request.decoded(5, array("q"))
    dues = [DueRequest(request, row) for row, request in enumerate(requests)]
    assert [due.candidates for due in dues] == [16, 13, 12, 13]
    freed = engine.plan_rounds(dues, table)
    tails = [range(100 * row + 15, 100 * row + 5 + due.candidates) for row, due in enumerate(dues)]
    assert sorted(freed.tolist()) == [slot for tail in tails for slot in tail]
    assert [request.evicted_tokens for request in requests] == [6, 3, 2, 3]
    assert len(freed) == engine.counters.evicted_tokens == 14
    assert [due.region.due_at for due in dues] == [21] * 4


def rounds_of(server: Running, answer: Answer) -> list[int]:
    """Logical length at each round."""
    paths = sorted(server.trace.glob(f"{answer.rid}-*.npz"))
    return [int(np.load(path)["logical"]) for path in paths]


@OVERLAP
def test_a_batch_of_the_server(server: Running) -> None:
    """Prompts of one length, sent at once: rounds where each prompt has them, in several steps."""
    server.server.flush_cache()
    page = server.setup.page_size
    prompts = [tokens_of(f"{number:2}: as long as others") for number in range(REQUESTS)]
    answers = send_all(server, [Ask(prompt, 2 * (BUDGET + INTERVAL)) for prompt in prompts])
    full = ceil_to(len(prompts[0]), page) + BUDGET + INTERVAL
    firsts = []
    for answer in answers:
        rounds = rounds_of(server, answer)
        firsts.append(full - stagger(server, answer.ask.prompt))
        assert rounds == [firsts[-1] + INTERVAL * later for later in range(len(rounds))]
        evicted = len(rounds) * INTERVAL - (full - firsts[-1])
        assert answer.meta["kv_policy"]["evicted_tokens"] == evicted
    assert set(firsts) <= set(range(full - INTERVAL + RECENT, full + 1, page))
    assert len(set(firsts)) > (INTERVAL - RECENT) // page * 2 // 3
    assert max(Counter(firsts).values()) < REQUESTS * 2 / 3
    alone = send(server, answers[-1].ask)
    assert rounds_of(server, alone) == rounds_of(server, answers[-1])
    assert alone.ids == answers[-1].ids
