"""What each event changes of a request, and what its questions say before and after."""

from __future__ import annotations

from array import array
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_tri.history import AliasStore, Chain
from sglang_tri.request.request import Request
from tests.life import MARK, SETTINGS, Life, answers, left_behind, running, staggered, state, text

PAGES = st.sampled_from([1, 4])
OUTPUTS = st.lists(st.sampled_from([5, *MARK]), min_size=1, max_size=60)
EVENTS = {"queued", "rematching", "matched", "prefilled", "chunked", "decoded", "evicted"}
ENDS = {"retracted", "finished"}


def test_every_name_is_a_field_an_event_or_a_question() -> None:
    public = {name for name in vars(Request) if not name.startswith("_")}
    attributes = {each.name for each in fields(Request)}
    assert public == attributes | EVENTS | ENDS | set(answers(Life()))


def test_queued_is_staggered_by_the_prompt_alone() -> None:
    for slots in range(5):
        prompt = staggered(slots)
        for rid, scope in (("a", None), ("b", "salt")):
            request = Request.queued(rid, prompt, SETTINGS, 1, array("q"), scope)
            assert (request.stagger, request.prompt_length, request.rid) == (slots, 10, rid)


def test_queued_holds_nothing() -> None:
    request = Life(mark=MARK).request
    assert not any([request.chain, request.delta, request.compressed, request.found_own])
    assert (request.resident(7), request.slots_to_come(7, 1000)) == (0, 40)
    assert set(request.report(0).values()) == {"", 0}


def test_scope_and_settings_keep_histories_apart() -> None:
    store, prompt = AliasStore(9), text(50)
    smaller, same = replace(SETTINGS, budget=21), replace(SETTINGS)
    scopes = [(SETTINGS, "a"), (same, "a"), (SETTINGS, "b"), (SETTINGS, None), (smaller, "a")]
    requests = [Request.queued("r", prompt, own, 1, array("q"), scope) for own, scope in scopes]
    chain = store.extend(Chain(), [(5, 30, 5, 9)])
    alias = store.add(requests[0].lookup, prompt, chain, None)
    found = [list(request.histories(store, prompt)) for request in requests]
    assert found == [[alias], [alias], [], [], []]


@pytest.mark.parametrize(("page", "start"), [(1, 10), (4, 12)])
def test_the_first_region_opens_behind_the_prompt(page: int, start: int) -> None:
    life = running(0, prompt=staggered(4, page=page), page=page)
    life.request.decoded(10, array("q", [5]))
    [region] = life.request.regions
    assert (region.opened, region.start, region.limit) == (10, start, start + 40)
    assert (region.stagger, region.delta_at_start) == (4, 0)
    life.request.decoded(11, array("q", [5, 6]))
    assert life.request.regions == [region]


def test_a_round_is_due_at_an_exact_length() -> None:
    request = running(1, prompt=staggered(3)).request
    assert [request.is_due(length) for length in (46, 47, 48)] == [False, True, True]
    request.evicted()
    assert [request.is_due(length) for length in (47, 49, 50)] == [False, False, True]


def test_evicted_counts_and_shortens() -> None:
    request = running(37, prompt=staggered(3)).request
    assert (request.delta, request.compressed, request.was_evicted_from) == (0, [], False)
    assert [request.evicted(), request.evicted()] == [17, 20]
    assert (request.compressed, request.was_evicted_from) == (request.regions, True)
    assert (request.delta, request.rounds, request.evicted_tokens) == (37, 2, 37)
    report = {"history": "exact", "rounds": 2, "evicted_tokens": 37, "resident_slots": 30}
    assert request.report(30) == report


def test_the_answer_has_a_region_of_its_own_that_is_not_staggered() -> None:
    """Its slots count from where the reasoning, evicted from before, has left off."""
    life = running(40, prompt=staggered(3), mark=MARK)
    life.decode([*MARK, 5])
    reasoning, answer = life.request.regions
    assert (reasoning.evicted, answer.evicted) == (17, 0)
    assert (answer.opened, answer.delta_at_start, answer.stagger) == (52 - 17, 17, 0)
    assert (life.request.compressed, life.request.delta) == ([reasoning], 17)
    assert life.request.evicted() == 20
    assert (reasoning.evicted, answer.evicted, life.request.delta) == (17, 20, 37)
    assert life.request.resident(60) == 50


def test_a_match_is_used_until_the_next_look_up() -> None:
    life = Life(text(50))
    alias, request = life.history(5, 30, 5, 9), life.request
    request.matched(alias)
    assert (request.history, request.chain, request.delta) == (alias, alias.chain, 21)
    request.prefilled(29, life.output)
    assert request.admitted
    request.rematching()
    assert (request.history, request.delta, request.admitted) == (None, 0, False)
    request.matched(alias)
    request.matched(None)
    assert (request.history, request.delta) == (None, 0)


def test_what_it_left_lasts_while_it_is_found() -> None:
    life, own = left_behind()
    request = life.request
    assert not request.found_own
    for _ in range(2):
        request.rematching()
        assert request.left is not None
        assert not request.found_own
        request.matched(own)
        assert request.found_own
    request.matched(None)
    assert request.left is None
    life, own = left_behind()
    life.request.matched(life.history(2, 8, 2, 4))
    assert life.request.left is None
    life.request.matched(own)
    assert not life.request.found_own


def test_histories_of_a_new_request() -> None:
    """All that are shorter than its tokens, the longest first."""
    life = Life(text(150))
    short, long, all_of_it = (life.history(5, end, 5, 9) for end in (30, 149, 150))
    assert list(life.request.histories(life.store, life.tokens)) == [long, short]
    assert all_of_it in life.store


def test_histories_of_a_resumed_request() -> None:
    """Its own first, then prefixes of its prompt; of what it has generated nothing else."""
    life = running(44, prompt=text(20))
    own = life.retract()
    assert own is not None
    request, tokens = life.request, life.tokens
    short, prompt, _, longer = (life.history(2, end, 2, 4) for end in (8, 19, 20, 60))
    assert longer.chain.end > own.chain.end
    assert list(request.histories(life.store, tokens)) == [own, prompt, short]
    assert list(request.histories(life.store, tokens[: own.chain.end])) == [prompt, short]
    life.store.drop(own)
    assert list(request.histories(life.store, tokens)) == [prompt, short]


def test_what_the_first_prefill_found_is_what_is_reported() -> None:
    life = Life(text(50))
    alias = life.history(5, 30, 5, 9)
    for first, later, word in ((alias, None, "compressed"), (None, alias, "exact")):
        request = Request.queued("r", life.prompt, SETTINGS, 1, array("q"))
        for history in (first, later):
            request.matched(history)
            request.prefilled(29, life.output)
            assert request.report(29)["history"] == word


@pytest.mark.parametrize("output", [[*MARK, *[5] * 45], [*[5] * 45, 901]])
def test_what_it_left_is_its_own_again(output: list[int]) -> None:
    """With the history that its prompt was found under, as if it had never been retracted.

    Thinking ends before its only round, or with the token that it was retracted before.
    """
    life = Life(text(50), mark=MARK)
    prompt, request = life.history(5, 30, 5, 9), life.request
    life.match(prompt)
    life.prefill()
    life.decode(output)
    regions, delta = request.regions, request.delta
    own = life.retract(902)
    assert (request.regions, request.delta, request.stays_out_of_tree) == ([], 0, False)
    life.match(own)
    assert request.delta == delta
    assert request.tokens_until_round(life.length) is None
    assert request.most_slots(life.output) == regions[-1].limit
    life.prefill()
    assert (request.history, request.regions, request.delta) == (prompt, regions, delta)
    assert (request.left, request.resumed, request.stays_out_of_tree) == (None, True, True)
    assert (request.rounds, request.admitted) == (1, True)
    assert request.tokens_until_round(life.length) == regions[-1].limit - life.length


def test_what_others_go_on_from_stays_like_a_prompt() -> None:
    life, own = left_behind()
    life.match(own)
    for most in (5, 1000):
        life.prefill(most, detached=False)
    request = life.request
    assert (request.history, request.regions, request.left) == (own, [], None)
    assert (request.resumed, request.stays_out_of_tree) == (False, False)
    assert (request.delta, request.evicted_tokens) == (20, 20)
    life.decode([5])
    assert (request.regions[0].opened, request.delta) == (35, 20)


def test_starting_over() -> None:
    """Nothing was evicted yet; the region opens with the first token behind the prompt."""
    life = running(50, prompt=staggered(4, page=4), page=4, mark=MARK)
    life.decode([*MARK, 5])
    request = life.request
    assert (request.rounds, request.thinking) == (1, False)
    life.retract(held=False)
    assert (request.rounds, request.resumed, request.left) == (1, True, None)
    life.match()
    assert request.tokens_until_round(0) == 12
    assert request.most_slots(life.output) == 12 + 40 + 40
    life.prefill(10)
    assert (request.rounds, request.evicted_tokens, request.regions) == (0, 0, [])
    assert (request.was_evicted_from, request.thinking) == (True, True)
    assert not request.stays_out_of_tree
    life.prefill()
    [region] = request.regions
    assert (life.length, region.opened, region.start, region.due_at) == (12, 10, 12, 48)
    assert request.stays_out_of_tree
    assert request.tokens_until_round(12) == 36
    life.prefill()
    assert life.length == 48
    assert (request.tokens_until_round(40), request.most_slots(life.output)) == (8, 92)


@pytest.mark.parametrize("answer", [0, 70])
@pytest.mark.parametrize("thinks", [0, 30, 38, 39, 58, 59])
def test_chunked_opens_a_region_where_no_round_comes_before(thinks: int, answer: int) -> None:
    """The rounds before the end of thinking are due behind 40 and 60 of its tokens."""
    life = running(thinks, mark=MARK)
    *output, sampled = [*MARK, *[5] * answer]
    life.decode(output)
    life.retract(sampled, held=False)
    life.match(None, 10)
    lasts, ends = [], thinks + len(MARK)
    while life.rest:
        life.prefill()
        region = life.request.regions[-1]
        lasts.append(region.opened + region.delta_at_start - 10)
        assert life.request.thinking == (lasts[-1] == 0)
    rounds = 0 if ends <= 40 else 1 if ends <= 60 else 2
    assert lasts == [0] * rounds + [ends] * (len(lasts) - rounds)
    assert len(lasts) > rounds
    assert life.request.most_slots(life.output) == 10 + ends - 20 * rounds + 40
    life.decode([5])
    assert len(life.request.regions) == 2


def test_slots_to_come_and_resident_slots() -> None:
    request = running(1, prompt=staggered(4, page=4), page=4).request
    assert [request.slots_to_come(11, tokens) for tokens in (1, 4, 5, 1000)] == [4, 4, 8, 41]
    assert [request.slots_to_come(length, 1000) for length in (51, 52, 60)] == [1, 0, 0]
    assert [request.resident(length) for length in (10, 52)] == [0, 42]


def test_retracted_leaves_what_was_compressed_and_can_be_found() -> None:
    life, own = left_behind()
    left = life.request.left
    assert left is not None
    assert (left.alias, left.history, left.regions[-1].evicted) == (own, None, 20)
    assert (life.request.rounds, life.request.was_evicted_from) == (1, True)
    for outputs, held in ((30, True), (44, False), (60, True)):
        life = running(outputs)
        life.retract(held=held)
        assert life.request.left is None, "exact, not held, and due"
        assert life.request.resumed
    exact = running(30).request
    exact.retracted(40, array("q", [5]), own)
    assert exact.left is None


def test_only_a_request_with_output_resumes() -> None:
    life, silent = running(0), running(0)
    life.retract()
    silent.retract(token=None)
    assert (life.request.resumed, silent.request.resumed) == (True, False)
    assert (life.request.tokens_until_round(3), life.request.most_slots(life.output)) == (7, 50)


def test_finished_holds_nothing() -> None:
    life, own = left_behind()
    life.match(own)
    life.prefill()
    request = life.request
    request.finished()
    assert (request.history, request.regions, request.resumed) == (None, [], False)
    assert (request.delta, request.resident(9), request.rounds) == (0, 0, 1)


@given(OUTPUTS, st.sets(st.integers(0, 121)), st.sampled_from([10, 39]), PAGES, st.data())
def test_retractions_change_no_round(
    output: list[int], at: set[int], prompt: int, page: int, data: st.DataObject
) -> None:
    """Whether it finds what it left or starts over, its regions are those it would have had.

    The longer prompt begins compressed.
    """
    output, seed = [*output, *output], data.draw(st.integers(0, 40))
    steady, broken = (Life(text(prompt, seed), page, MARK) for _ in range(2))
    for life in (steady, broken):
        history = life.history(4, 28, 4, 8) if prompt > 30 else None
        life.match(history)
        life.prefill()
    in_prompt = broken.length
    steady.decode(output)
    for number, token in enumerate(output):
        if number not in at:
            broken.decode([token])
            continue
        slots, own = broken.length, broken.retract(token, data.draw(st.booleans()))
        found = broken.request.left is not None
        most = slots if found else in_prompt
        broken.match(own if found else history, data.draw(st.integers(0, most)))
        broken.prefill_all()
    regions = [
        [replace(region, opened=0) for region in life.request.regions] for life in (steady, broken)
    ]
    assert regions[0] == regions[1]
    assert broken.request.report(broken.length) == steady.request.report(steady.length)


class AnyLife(RuleBasedStateMachine):
    """Events in any order that can come about."""

    @initialize(length=st.integers(1, 60), seed=st.integers(0, 40), page=PAGES, mark=st.booleans())
    def queue(self, length: int, seed: int, page: int, mark: bool) -> None:
        self.life = Life(text(length, seed), page, MARK if mark else ())
        self.request, self.page = self.life.request, page
        self.phase, self.slots, self.most, self.refused = "waiting", 0, 0, False
        if length > 40:
            self.life.history(4, 28, 4, 8)

    @precondition(lambda self: self.phase == "waiting")
    @rule(choice=st.integers(0, 3), more=st.integers(0, 100))
    def look_up(self, choice: int, more: int) -> None:
        life, request = self.life, self.request
        found = [*request.histories(life.store, life.tokens), None]
        alias = found[choice % len(found)]
        own = request.left is not None and alias is request.left.alias
        chain = alias.chain if alias else Chain()
        most = (
            self.slots if own else chain.physical_length(request.prompt_length - (not life.output))
        )
        slots = min(chain.last_slot + more, most) // self.page * self.page
        life.match(alias, slots)
        self.most = request.most_slots(life.output)

    @precondition(lambda self: self.phase != "decoding" and self.most)
    @rule(most=st.integers(1, 60), detached=st.booleans())
    def prefill(self, most: int, detached: bool) -> None:
        self.refused |= self.request.found_own and not detached
        self.life.prefill(most, detached)
        self.phase = "prefilling" if self.life.rest else "decoding"
        if self.request.resumed:
            assert self.life.length <= self.most

    @precondition(lambda self: self.phase == "decoding")
    @rule(output=OUTPUTS)
    def decode(self, output: list[int]) -> None:
        self.life.decode(output)

    @precondition(lambda self: self.phase == "decoding")
    @rule(held=st.booleans(), sampled=st.booleans())
    def retract(self, held: bool, sampled: bool) -> None:
        self.slots = self.life.length
        self.life.retract(5 if sampled or self.life.output else None, held)
        self.phase, self.most = "waiting", 0

    @rule()
    def forget(self) -> None:
        self.life.store.clear()

    @invariant()
    def questions_only_read(self) -> None:
        before, first = state(self.request), answers(self.life)
        assert answers(self.life) == first
        assert state(self.request) == before

    @invariant()
    def lengths_agree(self) -> None:
        life, request = self.life, self.request
        evicted = sum(region.evicted for region in request.regions)
        assert request.delta == request.chain.delta + evicted
        assert all(region.due_at <= region.limit for region in request.regions)
        assert not request.regions or life.length <= request.regions[-1].due_at
        if self.phase != "waiting":
            assert self.refused or request.evicted_tokens == evicted
            assert life.rest > 0 or self.phase == "decoding"


AnyLife.TestCase.settings = effort(max_examples=60, stateful_step_count=20, deadline=None)
TestAnyLife = AnyLife.TestCase
